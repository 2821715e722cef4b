// Layer norm and rms norm. Short rows take a warp each, four to a block; longer ones a block. A row is read from memory
// once and walked again from shared memory (or, where it does not fit, from the caches): its mean, its variance about that
// mean, its output. Every sum is in an order that the row's length fixes.
//
// Backward: a block takes every blocks-th row, adds each row's share of the weights' gradients to columns that its threads
// own, and leaves its sums in scratch memory; a second kernel adds those of all blocks in order. How many blocks there are
// depends on the number of rows alone, never on the GPU.
#include "cuda/layer_norm.h"

#include "cuda/numbers.h"

namespace pyllm::cuda {
namespace {

constexpr int64_t kWarpCols = 1024;         // rows up to this take a warp
constexpr int64_t kSharedBytes = 48 << 10;  // that need no asking for
constexpr int64_t kMaxBlocks = 264;         // of backward

struct Whole {  // which of the rows are packs of 16 bytes
  bool x, residual, y;
};

template <class T>
__global__ void __launch_bounds__(256) forward(NormArgs a, Whole whole, bool kept) {
  constexpr int kSize = Pack<T>::kSize;
  __shared__ float room[kWarp];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.x_rows.count) return;  // a whole warp, and then no other thread of the block waits for it
  const T* h = reinterpret_cast<const T*>(a.x) + a.x_rows.offset(row);
  const T* residual = a.residual ? reinterpret_cast<const T*>(a.residual) + a.residual_rows.offset(row) : nullptr;
  T* y = reinterpret_cast<T*>(a.y) + row * a.cols;
  T* stored = a.sum ? reinterpret_cast<T*>(a.sum) + row * a.cols : nullptr;
  auto* copy = reinterpret_cast<float*>(shared_memory()) + threadIdx.y * divided_up(a.cols, kSize) * kSize;
  const int64_t first = threadIdx.x * kSize, step = static_cast<int64_t>(blockDim.x) * kSize;

  // A thread reads again only what it wrote itself.
  const auto again = [&](int64_t i) {
    if (!kept) return load_pack(stored ? stored + i : h + i, a.cols - i, stored ? whole.y : whole.x);
    Pack<T> p;
#pragma unroll
    for (int k = 0; k < kSize; k++) p.x[k] = copy[i + k];
    return p;
  };
  float mean = 0;
  for (int64_t i = first; i < a.cols; i += step) {
    Pack<T> p = load_pack(h + i, a.cols - i, whole.x);
    if (residual) {
      const Pack<T> other = load_pack(residual + i, a.cols - i, whole.residual);
#pragma unroll
      for (int k = 0; k < kSize; k++) p.x[k] = to_float(from_float<T>(p.x[k] + other.x[k]));
      store_pack(stored + i, p, a.cols - i, whole.y);
    }
#pragma unroll
    for (int k = 0; k < kSize; k++) {
      if (kept) copy[i + k] = p.x[k];
      mean += p.x[k];
    }
  }
  mean = a.centred ? row_sum(mean, room) / a.cols : 0.0f;
  float variance = 0;
  for (int64_t i = first; i < a.cols; i += step) {
    const Pack<T> p = again(i);
#pragma unroll
    for (int k = 0; k < kSize; k++) {
      const float d = p.x[k] - mean;
      if (i + k < a.cols) variance = fmaf(d, d, variance);
    }
  }
  const float rstd = 1.0f / sqrtf(row_sum(variance, room) / a.cols + a.eps);
  if (threadIdx.x == 0) {
    if (a.rstd) a.rstd[row] = rstd;
    if (a.centred && a.mean) a.mean[row] = mean;
  }
  for (int64_t i = first; i < a.cols; i += step) {
    Pack<T> p = again(i);
#pragma unroll
    for (int k = 0; k < kSize; k++) p.x[k] = (p.x[k] - mean) * rstd;
    if (a.weight) {
      const Pack<T> w = load_parameter<T>(a.weight, a.weight_dtype, i, a.cols - i);
#pragma unroll
      for (int k = 0; k < kSize; k++) p.x[k] *= w.x[k];
    }
    if (a.bias) {
      const Pack<T> b = load_parameter<T>(a.bias, a.weight_dtype, i, a.cols - i);
#pragma unroll
      for (int k = 0; k < kSize; k++) p.x[k] += b.x[k];
    }
    store_pack(y + i, p, a.cols - i, whole.y);
  }
}

struct WholeBackward {
  bool dy, h, dsum, dh;
};

// partial: (gridDim.x, 2, cols), this block's sums of the gradients of weight and bias; or null.
template <class T>
__global__ void __launch_bounds__(256)
    backward(NormBackwardArgs a, WholeBackward whole, float* partial, bool in_shared) {
  constexpr int kSize = Pack<T>::kSize;
  __shared__ float room[kWarp];
  const int64_t first = threadIdx.x * kSize, step = static_cast<int64_t>(blockDim.x) * kSize;
  float* const total = partial ? partial + blockIdx.x * 2 * a.cols : nullptr;
  float* const dweight = in_shared ? reinterpret_cast<float*>(shared_memory()) : total;  // a thread's own columns
  float* const dbias = partial ? dweight + a.cols : nullptr;
  const auto each = [&](const auto& f) {
    for (int64_t i = first; i < a.cols; i += step)
#pragma unroll
      for (int k = 0; k < kSize; k++)
        if (i + k < a.cols) f(i + k);
  };
  if (partial) each([&](int64_t i) { dweight[i] = dbias[i] = 0; });
  for (int64_t row = blockIdx.x; row < a.h_rows.count; row += gridDim.x) {
    const T* dy = reinterpret_cast<const T*>(a.dy) + a.dy_rows.offset(row);
    const T* h = reinterpret_cast<const T*>(a.h) + a.h_rows.offset(row);
    const float mean = a.centred ? a.mean[row] : 0.0f, rstd = a.rstd[row];
    float along = 0, level = 0;
    for (int64_t i = first; i < a.cols; i += step) {
      const Pack<T> g = load_pack(dy + i, a.cols - i, whole.dy), x = load_pack(h + i, a.cols - i, whole.h);
#pragma unroll
      for (int k = 0; k < kSize; k++) {
        if (i + k >= a.cols) continue;
        const float unit = (x.x[k] - mean) * rstd;
        const float weighted = a.weight ? g.x[k] * float_at(a.weight, a.weight_dtype, i + k) : g.x[k];
        along = fmaf(weighted, unit, along);
        level += weighted;
        if (!partial) continue;
        dweight[i + k] = fmaf(g.x[k], unit, dweight[i + k]);
        dbias[i + k] += g.x[k];
      }
    }
    if (!a.dh) continue;
    along = row_sum(along, room) / a.cols;
    level = a.centred ? row_sum(level, room) / a.cols : 0.0f;
    const T* dsum = a.dsum ? reinterpret_cast<const T*>(a.dsum) + a.dsum_rows.offset(row) : nullptr;
    T* dh = reinterpret_cast<T*>(a.dh) + row * a.cols;
    for (int64_t i = first; i < a.cols; i += step) {
      const int64_t left = a.cols - i;
      Pack<T> g = load_pack(dy + i, left, whole.dy);
      const Pack<T> x = load_pack(h + i, left, whole.h);
#pragma unroll
      for (int k = 0; k < kSize; k++) {
        const float unit = (x.x[k] - mean) * rstd;
        const float weighted = a.weight && k < left ? g.x[k] * float_at(a.weight, a.weight_dtype, i + k) : g.x[k];
        g.x[k] = (weighted - fmaf(unit, along, level)) * rstd;
      }
      if (dsum) {
        const Pack<T> d = load_pack(dsum + i, left, whole.dsum);
#pragma unroll
        for (int k = 0; k < kSize; k++) g.x[k] += d.x[k];
      }
      store_pack(dh + i, g, left, whole.dh);
    }
  }
  if (in_shared) each([&](int64_t i) { total[i] = dweight[i], total[a.cols + i] = dbias[i]; });
}

__global__ void __launch_bounds__(128) add_blocks(NormBackwardArgs a, const float* partial, int64_t blocks) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.cols) return;
  float dweight = 0, dbias = 0;
  for (int64_t block = 0; block < blocks; block++) {
    dweight += partial[block * 2 * a.cols + i];
    dbias += partial[(block * 2 + 1) * a.cols + i];
  }
  if (a.dweight) put_at(a.dweight, a.weight_dtype, i, dweight);
  if (a.dbias) put_at(a.dbias, a.weight_dtype, i, dbias);
}

}  // namespace

void norm_forward(const NormArgs& a, const Work& work) {
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const int64_t row_bytes = a.cols * sizeof(T);
    const Whole whole{whole_rows(a.x, a.x_rows, sizeof(T)), whole_rows(a.residual, a.residual_rows, sizeof(T)),
                      whole_packs(a.y, row_bytes) && whole_packs(a.sum, row_bytes)};
    const bool warps = a.cols <= kWarpCols;
    const dim3 block = warps ? dim3(kWarp, 4) : dim3(256);
    const int64_t bytes = block.y * divided_up(a.cols, Pack<T>::kSize) * Pack<T>::kSize * sizeof(float);
    const bool kept = bytes + kWarp * static_cast<int64_t>(sizeof(float)) <= kSharedBytes;
    launch(forward<T>, {divided_up(a.x_rows.count, block.y)}, block, kept ? bytes : 0, work, a, whole, kept);
  });
}

void norm_backward(const NormBackwardArgs& a, const Work& work) {
  const bool parameters = a.dweight || a.dbias;
  const int64_t blocks = parameters ? std::min(a.h_rows.count, kMaxBlocks) : blocks_for(a.h_rows.count);
  const Scratch partial(work, parameters ? blocks * 2 * a.cols * sizeof(float) : 0);
  const int64_t bytes = 2 * a.cols * sizeof(float);
  const bool in_shared = parameters && bytes + kWarp * static_cast<int64_t>(sizeof(float)) <= kSharedBytes;
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const WholeBackward whole{whole_rows(a.dy, a.dy_rows, sizeof(T)), whole_rows(a.h, a.h_rows, sizeof(T)),
                              whole_rows(a.dsum, a.dsum_rows, sizeof(T)), whole_packs(a.dh, a.cols * sizeof(T))};
    const int64_t warps = std::clamp<int64_t>(divided_up(a.cols, Pack<T>::kSize * kWarp), 1, 8);
    launch(backward<T>, {blocks}, dim3(static_cast<unsigned>(warps * kWarp)), in_shared ? bytes : 0, work, a, whole,
           partial.as<float>(), in_shared);
  });
  if (parameters)
    launch(add_blocks, {divided_up(a.cols, 128)}, dim3(128), 0, work, a, partial.as<const float>(), blocks);
}

}  // namespace pyllm::cuda

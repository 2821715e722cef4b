// Rows of a packed weight, widened: what an embedding takes of it, a warp an id, and what the gradient of a product's input
// needs. That is a plain tiled product: a block takes 64 rows by 32 columns of dx, and widens 32 of the weight's rows at a
// time into shared memory. A sum's order is that of the weight's rows, as on the CPU, whose bits it has.
#include "cuda/numbers.h"
#include "cuda/quantized_linear.h"

namespace pyllm::cuda {
namespace {

constexpr int64_t kPanel = kQuantizedPanel;
constexpr int kRows = 64, kColumns = 32, kDepth = 32, kThreads = 256;  // of a block of backward

// A word of a row's group, widened: `put` gets element by element, and where in the group that is.
template <class F>
__device__ __forceinline__ void widen(const QuantizedWeight& w, const char* panels, int64_t row, int64_t g, int word,
                                      const F& put) {
  const int64_t column = row % kPanel, value_bytes = w.value_bytes();
  const char* group = panels + (row / kPanel * w.groups + g) * w.group_bytes(kPanel);
  const uint32_t bytes = reinterpret_cast<const uint32_t*>(group)[word * kPanel + column];
  const char* beside = group + value_bytes * kPanel;
  const float scale = float_at(beside, w.scale_dtype, column);
  const float minimum = w.has_minimums ? float_at(beside, w.scale_dtype, kPanel + column) : 0.0f;
  const float zero = w.has_minimums ? 0.0f : static_cast<float>(1 << (w.bits - 1));
  // Rounded after the product and after the sum, as `dequantize` in Python does.
  const auto value = [&](uint32_t whole) {
    return __fadd_rn(__fmul_rn(static_cast<float>(whole) - zero, scale), minimum);
  };
#pragma unroll
  for (int b = 0; b < 4; b++) {
    const uint32_t byte = bytes >> (8 * b) & 255;
    if (w.bits == 8) {
      put(4 * word + b, value(byte));
    } else {
      put(4 * word + b, value(byte & 15));
      put(w.group / 2 + 4 * word + b, value(byte >> 4));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) take_rows(QuantizedEmbeddingArgs a, FaultRecord* record) {
  const QuantizedWeight& w = a.weight;
  const int64_t words = w.value_bytes() / 4;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; i < a.count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t id = integer_at(a.ids, a.ids_dtype, i);
    T* out = reinterpret_cast<T*>(a.out) + i * a.k;
    if (id < 0 || id >= w.n) {
      if (threadIdx.x == 0) report(record, Fault::quantized_embedding_id, i, id, w.n);
      for (int64_t k = threadIdx.x; k < a.k; k += kWarp) out[k] = from_float<T>(NAN);
      continue;
    }
    for (int64_t at = threadIdx.x; at < w.groups * words; at += kWarp) {
      const int64_t g = at / words;
      widen(w, a.panels, id, g, static_cast<int>(at % words), [&](int64_t k, float x) {
        if (g * w.group + k < a.k) out[g * w.group + k] = from_float<T>(x);
      });
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward(QuantizedLinearBackwardArgs a) {
  constexpr int kDown = 4, kAcross = 2;  // elements of a thread
  __shared__ float weight[kDepth][kColumns], dy[kRows][kDepth + 1];
  const QuantizedWeight& w = a.weight;
  const int x = threadIdx.x % (kColumns / kAcross), y = threadIdx.x / (kColumns / kAcross);
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kRows, column0 = static_cast<int64_t>(blockIdx.x) * kColumns;
  const int words = static_cast<int>(w.value_bytes() / 4), groups = kColumns / static_cast<int>(w.group);
  float sums[kDown][kAcross] = {};
  for (int64_t n0 = 0; n0 < w.n; n0 += kDepth) {
    const int depth = static_cast<int>(w.n - n0 < kDepth ? w.n - n0 : kDepth);
    __syncthreads();  // what was there has been used
    for (int i = threadIdx.x; i < kDepth * words * groups; i += kThreads) {
      // Neighbours take neighbours in memory: a panel's rows, then its words.
      const int row = i / kPanel / words / groups * kPanel + i % kPanel, word = i / kPanel % words;
      const int own = i / static_cast<int>(kPanel) / words % groups;
      const int64_t g = column0 / w.group + own;
      if (row >= depth || g >= w.groups) continue;
      widen(w, a.panels, n0 + row, g, word, [&](int64_t k, float v) { weight[row][own * w.group + k] = v; });
    }
    for (int i = threadIdx.x; i < kRows * kDepth; i += kThreads) {
      const int row = i / kDepth, at = i % kDepth;
      if (row0 + row < a.m && at < depth)
        dy[row][at] = to_float(reinterpret_cast<const T*>(a.dy)[(row0 + row) * a.dy_row + n0 + at]);
    }
    __syncthreads();
    for (int at = 0; at < depth; at++) {
      float b[kAcross];
#pragma unroll
      for (int c = 0; c < kAcross; c++) b[c] = weight[at][c * (kColumns / kAcross) + x];
#pragma unroll
      for (int r = 0; r < kDown; r++) {
        const float d = dy[r * (kRows / kDown) + y][at];
#pragma unroll
        for (int c = 0; c < kAcross; c++) sums[r][c] = fmaf(d, b[c], sums[r][c]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kDown; r++)
#pragma unroll
    for (int c = 0; c < kAcross; c++) {
      const int64_t row = row0 + r * (kRows / kDown) + y, column = column0 + c * (kColumns / kAcross) + x;
      if (row < a.m && column < a.k) a.dx[row * a.k + column] = sums[r][c];
    }
}

}  // namespace

void quantized_embedding(const QuantizedEmbeddingArgs& a, const Work& work) {
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    launch(take_rows<T>, {blocks_for(divided_up(a.count, kThreads / kWarp))}, dim3(kWarp, kThreads / kWarp), 0, work, a,
           fault_record(work.device));
  });
}

void quantized_linear_backward(const QuantizedLinearBackwardArgs& a, const Work& work) {
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    launch(backward<T>, {divided_up(a.k, kColumns), divided_up(a.m, kRows)}, dim3(kThreads), 0, work, a);
  });
}

}  // namespace pyllm::cuda

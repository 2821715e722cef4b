// Attention, forward. bfloat16 and float16 go through matrix instructions where shapes and strides allow: those of a warp
// (attention_mma.cu) or, for many queries on sm_90 and where it is asked for, those of a warpgroup (attention_wgmma.cu);
// everything else, float32 first of all, through this file's kernel, in float32 throughout: 16 rows and 32 keys at a time,
// a warp for every fourth row. For scores a lane takes a key; for the output it takes elements of the value.
//
// The weights, where they are asked for, are computed once more from the scores and the sums, a warp a row.
#include "cuda/attention.h"

#include <type_traits>

#include "cuda/attention_rows.h"

namespace pyllm::cuda {
namespace {

constexpr int kRows = 16, kWarps = 4, kKeys = 32, kEach = kRows / kWarps;  // rows of a warp

// count rows of `dim` elements as floats, `step` apart.
template <class T, class F>
__device__ __forceinline__ void load_rows(float* to, int count, int dim, int step, const F& row_of) {
  for (int i = threadIdx.x; i < count * dim; i += blockDim.x) {
    const T* from = row_of(i / dim);
    to[i / dim * step + i % dim] = from ? to_float(from[i % dim]) : 0.0f;
  }
}

size_t shared_bytes(const AttentionArgs& a) {
  return (kRows * a.dim + kKeys * (a.dim + 1) + kKeys * a.value_dim) * sizeof(float);
}

template <class T, int kWide>  // kWide * 32: at least value_dim
__global__ void __launch_bounds__(kWarps* kWarp)
    walk(AttentionForwardArgs f, Partials partials, int64_t tiles, FaultRecord* record) {
  const AttentionArgs& a = f.in;
  const int dim = static_cast<int>(a.dim), value_dim = static_cast<int>(a.value_dim);
  auto* const queries = reinterpret_cast<float*>(shared_memory());
  float* const keys = queries + kRows * dim;  // a row more than dim apart: 32 lanes read 32 banks
  float* const values = keys + kKeys * (dim + 1);
  const Place at = place_of(a, tiles, partials.max ? partials.splits : 1);
  const Tile t = tile_of(a, at.batch, at.kv_head, (tiles - 1 - at.tile) * kRows, kRows, length_of(a, at.batch, record));
  const Range range = seen_in_split(a, t, partials, at.split);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  load_rows<T>(queries, static_cast<int>(t.count), dim, dim, [&](int i) { return query_at<T>(a.q, a.q_step, t, i); });
  RowMask masks[kEach];
  float max[kEach], sum[kEach], out[kEach][kWide];
#pragma unroll
  for (int r = 0; r < kEach; r++) {
    masks[r] = mask_of(a, t, warp + r * kWarps);
    max[r] = -INFINITY;
    sum[r] = 0;
#pragma unroll
    for (int w = 0; w < kWide; w++) out[r][w] = 0;
  }
  for (int64_t first = range.lo / kKeys * kKeys; first < range.hi; first += kKeys) {
    const int count = static_cast<int>(t.length - first < kKeys ? t.length - first : kKeys);
    const T* k = key_at<T>(a, a.k, a.k_step, t, first, record);  // a tile lies within one page
    const T* v = key_at<T>(a, a.v, a.v_step, t, first, record);
    __syncthreads();
    load_rows<T>(keys, count, dim, dim + 1, [&](int j) { return k ? k + j * a.k_step[1] : nullptr; });
    load_rows<T>(values, count, value_dim, value_dim, [&](int j) { return v ? v + j * a.v_step[1] : nullptr; });
    __syncthreads();
    float scores[kEach] = {};
    if (lane < count)
      for (int d = 0; d < dim; d++) {
        const float x = keys[lane * (dim + 1) + d];
#pragma unroll
        for (int r = 0; r < kEach; r++) {
          const int row = warp + r * kWarps;
          if (row < t.count) scores[r] = fmaf(queries[row * dim + d], x, scores[r]);
        }
      }
#pragma unroll
    for (int r = 0; r < kEach; r++) {
      if (warp + r * kWarps >= t.count) continue;
      float capped = 0;
      const float s = lane < count ? score_of(a, t, masks[r], first + lane, scores[r], capped) : -INFINITY;
      const float most = fmaxf(max[r], warp_max(s)), base = finite_or_zero(most), rescale = exp2f(max[r] - base);
      const float p = exp2f(s - base);
      max[r] = most;
      sum[r] = sum[r] * rescale + warp_sum(p);
#pragma unroll
      for (int w = 0; w < kWide; w++) out[r][w] *= rescale;
      for (int j = 0; j < count; j++) {
        const float weight = __shfl_sync(~0u, p, j);
        if (weight == 0) continue;  // a masked key's value, whatever it is, adds nothing
#pragma unroll
        for (int w = 0; w < kWide; w++)
          if (lane + w * kWarp < value_dim)
            out[r][w] = fmaf(weight, values[j * value_dim + lane + w * kWarp], out[r][w]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kEach; r++) {
    const int row = warp + r * kWarps;
    if (row >= t.count) continue;
    const int64_t partial = partials.max ? partial_at(a, t, partials, row, at.split) : 0;
    T* to = reinterpret_cast<T*>(f.out) + out_row(a, t, row) * value_dim;
#pragma unroll
    for (int w = 0; w < kWide; w++) {
      const int column = lane + w * kWarp;
      if (column >= value_dim) continue;
      if (!partials.max)
        to[column] = from_float<T>(out[r][w] * share_of(sum[r]));
      else if (sum[r] != 0)
        partials.values[partial * value_dim + column] = out[r][w];
    }
    if (lane != 0) continue;
    if (partials.max) {
      partials.max[partial] = max[r];
      partials.sum[partial] = sum[r];
    } else if (f.lse) {
      f.lse[lse_at(a, t, row)] = lse_of(max[r], sum[r]);
    }
  }
}

// The splits of a row, merged in order; a block a row. A split in which the row sees nothing has a sum of 0, and no values.
template <class T>
__global__ void __launch_bounds__(128) merge(AttentionForwardArgs f, Partials p, FaultRecord* record) {
  constexpr int kSize = 256;  // splits whose factors lie in shared memory together
  __shared__ float factors[kSize], room[kWarp];
  const AttentionArgs& a = f.in;
  const Place at = place_of(a, a.queries * (a.heads / a.kv_heads));  // a tile a row
  const Tile t = tile_of(a, at.batch, at.kv_head, at.tile, 1, length_of(a, at.batch, record));
  const int64_t first = partial_at(a, t, p, 0, 0), splits = divided_up(t.length, p.keys);
  float max = -INFINITY, sum = 0, out[2] = {0, 0};  // of columns threadIdx.x and + 128
  for (int64_t s = threadIdx.x; s < splits; s += 128) max = fmaxf(max, p.max[first + s]);
  max = row_max(max, room);
  const float base = finite_or_zero(max);
  for (int64_t from = 0; from < splits; from += kSize) {
    const int count = static_cast<int>(splits - from < kSize ? splits - from : kSize);
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += 128) factors[i] = exp2f(p.max[first + from + i] - base);
    __syncthreads();
    for (int i = 0; i < count; i++) {
      const float part = p.sum[first + from + i];
      if (part == 0) continue;
      sum = fmaf(part, factors[i], sum);
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int64_t column = threadIdx.x + c * 128;
        if (column < a.value_dim)
          out[c] = fmaf(p.values[(first + from + i) * a.value_dim + column], factors[i], out[c]);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < 2; c++) {
    const int64_t column = threadIdx.x + c * 128;
    if (column < a.value_dim)
      reinterpret_cast<T*>(f.out)[out_row(a, t, 0) * a.value_dim + column] = from_float<T>(out[c] * share_of(sum));
  }
  if (threadIdx.x == 0 && f.lse) f.lse[lse_at(a, t, 0)] = lse_of(max, sum);
}

// weights (batch, heads, queries, keys) = 2^(score - lse); a warp a row, a lane a key.
template <class T>
__global__ void __launch_bounds__(128) write_weights(AttentionForwardArgs f, FaultRecord* record) {
  const AttentionArgs& a = f.in;
  const int64_t group = a.heads / a.kv_heads, rows = a.queries * group, all = a.batch * a.kv_heads * rows;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / kWarp; i < all;
       i += static_cast<int64_t>(gridDim.x) * 4) {
    const int64_t batch = i / rows / a.kv_heads;
    const Tile t = tile_of(a, batch, i / rows % a.kv_heads, i % rows, 1, length_of(a, batch, record));
    const RowMask mask = mask_of(a, t, 0);
    const T* q = query_at<T>(a.q, a.q_step, t, 0);
    const int64_t at = lse_at(a, t, 0);
    for (int64_t j = threadIdx.x % kWarp; j < a.keys; j += kWarp) {
      float weight = 0, product = 0, capped = 0;
      const T* k = j >= mask.range.lo && j < mask.range.hi ? key_at<T>(a, a.k, a.k_step, t, j, record) : nullptr;
      if (k) {
        for (int64_t d = 0; d < a.dim; d++) product = fmaf(to_float(q[d]), to_float(k[d]), product);
        weight = exp2f(score_of(a, t, mask, j, product, capped) - f.lse[at]);
      }
      reinterpret_cast<T*>(f.weights)[at * a.keys + j] = from_float<T>(weight);
    }
  }
}

template <class T>
void forward_by_threads(const AttentionForwardArgs& f, const Partials& partials, const Work& work) {
  const AttentionArgs& a = f.in;
  const int64_t tiles = divided_up(a.queries * (a.heads / a.kv_heads), kRows);
  const int64_t blocks = a.batch * a.kv_heads * tiles * (partials.max ? partials.splits : 1);
  const auto kernel = a.value_dim <= 64 ? walk<T, 2> : a.value_dim <= 128 ? walk<T, 4> : walk<T, 8>;
  launch(kernel, {blocks}, dim3(kWarps * kWarp), shared_bytes(a), work, f, partials, tiles, fault_record(work.device));
}

}  // namespace

void attention_forward(const AttentionForwardArgs& f, const Work& work) {
  const AttentionArgs& a = f.in;
  if (a.batch * a.queries * a.heads == 0) return;
  const int64_t rows = a.queries * (a.heads / a.kv_heads), all = a.batch * a.kv_heads * rows;
  const int64_t split_keys = split_of(a);
  const bool split = rows <= kFewRows && a.keys > split_keys;
  const int64_t splits = split ? divided_up(a.keys, split_keys) : 0;
  const Scratch scratch(work, all * splits * (2 + a.value_dim) * sizeof(float));
  auto* const p = scratch.as<float>();
  const Partials partials{p, p + all * splits, p + 2 * all * splits, splits, split_keys};
  const Partials none{};
  const bool done = forward_by_warpgroups(f, work) || forward_by_matrices(f, split ? partials : none, work);
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    if (!done) forward_by_threads<T>(f, split ? partials : none, work);
    if (split) launch(merge<T>, {all}, dim3(128), 0, work, f, partials, fault_record(work.device));
    if (f.weights)
      launch(write_weights<T>, {blocks_for(divided_up(all, 4))}, dim3(128), 0, work, f, fault_record(work.device));
  });
}

}  // namespace pyllm::cuda

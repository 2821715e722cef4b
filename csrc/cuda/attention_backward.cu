// Attention, backward, in float32 throughout, by threads alone: the weights are computed again from the scores and the sums
// that forward kept. One kernel takes 16 rows and walks the keys that they see, for the gradient of the queries; one takes
// 16 keys and walks the rows that see them, for those of keys and values; one takes an element of the bias and adds up
// whatever it was broadcast over. None of them adds to what another block writes, so the sums have one order.
#include <type_traits>

#include "cuda/attention.h"
#include "cuda/attention_rows.h"

namespace pyllm::cuda {
namespace {

constexpr int kOwn = 16, kOther = 32, kWarps = 4, kEach = kOwn / kWarps;  // a warp's rows or keys

struct Kept {  // of a row
  float lse, delta;
};
struct Gradients {  // of a row and a key: its weight; what reaches the score with its bias, and the product
  float weight, score, product;
};
__device__ __forceinline__ Gradients gradients_of(const AttentionBackwardArgs& f, const Tile& t, const RowMask& mask,
                                                  const Kept& kept, int64_t j, float product, float dweight) {
  const AttentionArgs& a = f.in;
  float capped = 0;
  const float score = score_of(a, t, mask, j, product, capped);
  if (score == -INFINITY) return {0, 0, 0};
  if (f.dweights) {
    const int64_t at = ((t.batch * a.heads + mask.head) * a.queries + mask.query) * a.keys + j;
    dweight += float_at(f.dweights, a.dtype, at);
  }
  const float weight = exp2f(score - kept.lse), d = weight * (dweight - kept.delta);
  return {weight, d, d * a.scale * (a.softcap > 0 ? 1.0f - capped * capped : 1.0f)};
}

template <class T>
__device__ __forceinline__ float dot(const T* a, const T* b, int64_t n) {
  float s = 0;
  for (int64_t i = 0; i < n; i++) s = fmaf(to_float(a[i]), to_float(b[i]), s);
  return s;
}

// delta (batch, heads, queries): the gradient times the result, a row; a warp each.
template <class T>
__global__ void __launch_bounds__(128) set_delta(AttentionBackwardArgs f, float* delta) {
  const AttentionArgs& a = f.in;
  const int64_t rows = a.batch * a.queries * a.heads;
  const int lane = threadIdx.x % kWarp;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / kWarp; i < rows;
       i += static_cast<int64_t>(gridDim.x) * 4) {
    const int64_t head = i % a.heads, query = i / a.heads % a.queries, batch = i / a.heads / a.queries;
    const T* out = reinterpret_cast<const T*>(f.out) + i * a.value_dim;
    const T* dout =
        reinterpret_cast<const T*>(f.dout) + batch * f.dout_step[0] + query * f.dout_step[1] + head * f.dout_step[2];
    const int64_t at = (batch * a.heads + head) * a.queries + query;
    float s = 0;
    for (int64_t d = lane; d < a.value_dim; d += kWarp) s = fmaf(to_float(out[d]), to_float(dout[d]), s);
    if (f.dweights)
      for (int64_t j = lane; j < a.keys; j += kWarp)
        s = fmaf(float_at(f.weights, a.dtype, at * a.keys + j), float_at(f.dweights, a.dtype, at * a.keys + j), s);
    s = warp_sum(s);
    if (lane == 0) delta[at] = s;
  }
}

// count rows of `dim` elements as floats, `step` apart.
template <class T, class F>
__device__ __forceinline__ void load_rows(float* to, int count, int dim, int step, const F& row_of) {
  for (int i = threadIdx.x; i < count * dim; i += blockDim.x)
    to[i / dim * step + i % dim] = to_float(row_of(i / dim)[i % dim]);
}

struct Room {  // shared memory: 16 rows that the warps own, 32 that the lanes take, of each of two kinds
  float *own, *own_values, *other, *other_values;

  __device__ Room(int dim, int value_dim) {
    own = reinterpret_cast<float*>(shared_memory());
    own_values = own + kOwn * dim;
    other = own_values + kOwn * value_dim;
    other_values = other + kOther * (dim + 1);
  }
};
size_t shared_bytes(const AttentionArgs& a) {
  return (kOwn * (a.dim + a.value_dim) + kOther * (a.dim + a.value_dim + 2)) * sizeof(float);
}

// products[r] = the warp's rows r of `own` times the lane's row of `other`.
__device__ __forceinline__ void multiply(const float* own, const float* other, int dim, int warp, int lane,
                                         int own_count, int other_count, float (&products)[kEach]) {
#pragma unroll
  for (int r = 0; r < kEach; r++) products[r] = 0;
  if (lane >= other_count) return;
  for (int d = 0; d < dim; d++) {
    const float x = other[lane * (dim + 1) + d];
#pragma unroll
    for (int r = 0; r < kEach; r++)
      if (warp + r * kWarps < own_count) products[r] = fmaf(own[(warp + r * kWarps) * dim + d], x, products[r]);
  }
}

// sums[w] += over the lanes' rows i, in order, of mine_i * other[i][lane + 32 w].
template <int kWide>
__device__ __forceinline__ void add_rows(float mine, const float* other, int dim, int lane, int count,
                                         float (&sums)[kWide]) {
  for (int i = 0; i < count; i++) {
    const float factor = __shfl_sync(~0u, mine, i);
    if (factor == 0) continue;
#pragma unroll
    for (int w = 0; w < kWide; w++)
      if (lane + w * kWarp < dim) sums[w] = fmaf(factor, other[i * (dim + 1) + lane + w * kWarp], sums[w]);
  }
}

template <class T, int kWide>
__device__ __forceinline__ void write_row(T* to, const float (&sums)[kWide], int dim, int lane) {
#pragma unroll
  for (int w = 0; w < kWide; w++)
    if (lane + w * kWarp < dim) to[lane + w * kWarp] = from_float<T>(sums[w]);
}

template <class T, int kWide>  // kWide * 32: at least dim
__global__ void __launch_bounds__(kWarps* kWarp)
    queries(AttentionBackwardArgs f, const float* delta, int64_t tiles, FaultRecord* record) {
  const AttentionArgs& a = f.in;
  const int dim = static_cast<int>(a.dim), value_dim = static_cast<int>(a.value_dim);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Room room(dim, value_dim);
  const int64_t head = blockIdx.x / tiles, first_row = (tiles - 1 - blockIdx.x % tiles) * kOwn;
  const Tile t = tile_of(a, head / a.kv_heads, head % a.kv_heads, first_row, kOwn, record);
  const Range range = seen_by_some(a, t);
  const int rows = static_cast<int>(t.count);
  load_rows<T>(room.own, rows, dim, dim, [&](int i) { return query_at<T>(a.q, a.q_step, t, i); });
  load_rows<T>(room.own_values, rows, value_dim, value_dim,
               [&](int i) { return query_at<T>(f.dout, f.dout_step, t, i); });
  RowMask masks[kEach];
  Kept kept[kEach];
  float dq[kEach][kWide] = {};
#pragma unroll
  for (int r = 0; r < kEach; r++) {
    const int row = warp + r * kWarps;
    masks[r] = mask_of(a, t, row);
    kept[r] = row < rows ? Kept{f.lse[lse_at(a, t, row)], delta[lse_at(a, t, row)]} : Kept{0, 0};
  }
  for (int64_t first = range.lo / kOther * kOther; first < range.hi; first += kOther) {
    const int count = static_cast<int>(t.length - first < kOther ? t.length - first : kOther);
    __syncthreads();
    load_rows<T>(room.other, count, dim, dim + 1,
                 [&](int j) { return key_at<T>(a, a.k, a.k_step, t, first + j, record); });
    load_rows<T>(room.other_values, count, value_dim, value_dim + 1,
                 [&](int j) { return key_at<T>(a, a.v, a.v_step, t, first + j, record); });
    __syncthreads();
    float products[kEach], dweights[kEach];
    multiply(room.own, room.other, dim, warp, lane, rows, count, products);
    multiply(room.own_values, room.other_values, value_dim, warp, lane, rows, count, dweights);
#pragma unroll
    for (int r = 0; r < kEach; r++) {
      if (warp + r * kWarps >= rows) continue;
      float d = 0;
      if (lane < count) d = gradients_of(f, t, masks[r], kept[r], first + lane, products[r], dweights[r]).product;
      add_rows(d, room.other, dim, lane, count, dq[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kEach; r++)
    if (warp + r * kWarps < rows)
      write_row(reinterpret_cast<T*>(f.dq) + out_row(a, t, warp + r * kWarps) * dim, dq[r], dim, lane);
}

template <class T, int kWide>  // kWide * 32: at least dim and value_dim
__global__ void __launch_bounds__(kWarps* kWarp)
    keys(AttentionBackwardArgs f, const float* delta, int64_t tiles, FaultRecord* record) {
  const AttentionArgs& a = f.in;
  const int dim = static_cast<int>(a.dim), value_dim = static_cast<int>(a.value_dim);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Room room(dim, value_dim);
  const int64_t head = blockIdx.x / tiles, first = blockIdx.x % tiles * kOwn;
  const int64_t batch = head / a.kv_heads, kv_head = head % a.kv_heads, all_rows = a.queries * (a.heads / a.kv_heads);
  const int own = static_cast<int>(a.keys - first < kOwn ? a.keys - first : kOwn);
  const int64_t own_row = (batch * a.keys + first) * a.kv_heads + kv_head;  // of dk and dv, of the first key
  float dk[kEach][kWide] = {}, dv[kEach][kWide] = {};
  for (int64_t first_row = 0; first_row < all_rows; first_row += kOther) {
    const Tile t = tile_of(a, batch, kv_head, first_row, kOther, record);
    const Range range = seen_by_some(a, t);
    if (range.lo >= first + own || range.hi <= first) continue;
    const int rows = static_cast<int>(t.count),
              live = static_cast<int>(t.length - first < own ? t.length - first : own);
    __syncthreads();
    // The keys are loaded again with each tile of rows: they lie in the caches, and need no memory of their own.
    load_rows<T>(room.own, live, dim, dim, [&](int j) { return key_at<T>(a, a.k, a.k_step, t, first + j, record); });
    load_rows<T>(room.own_values, live, value_dim, value_dim,
                 [&](int j) { return key_at<T>(a, a.v, a.v_step, t, first + j, record); });
    load_rows<T>(room.other, rows, dim, dim + 1, [&](int i) { return query_at<T>(a.q, a.q_step, t, i); });
    load_rows<T>(room.other_values, rows, value_dim, value_dim + 1,
                 [&](int i) { return query_at<T>(f.dout, f.dout_step, t, i); });
    __syncthreads();
    const RowMask mask = mask_of(a, t, lane);
    const Kept kept = lane < rows ? Kept{f.lse[lse_at(a, t, lane)], delta[lse_at(a, t, lane)]} : Kept{0, 0};
    float products[kEach], dweights[kEach];
    multiply(room.own, room.other, dim, warp, lane, live, rows, products);
    multiply(room.own_values, room.other_values, value_dim, warp, lane, live, rows, dweights);
#pragma unroll
    for (int r = 0; r < kEach; r++) {
      const int key = warp + r * kWarps;
      if (key >= live) continue;
      Gradients g{0, 0, 0};
      if (lane < rows) g = gradients_of(f, t, mask, kept, first + key, products[r], dweights[r]);
      add_rows(g.product, room.other, dim, lane, rows, dk[r]);
      add_rows(g.weight, room.other_values, value_dim, lane, rows, dv[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kEach; r++) {
    const int key = warp + r * kWarps;
    if (key >= own) continue;
    const int64_t row = own_row + key * a.kv_heads;
    write_row(reinterpret_cast<T*>(f.dk) + row * dim, dk[r], dim, lane);
    write_row(reinterpret_cast<T*>(f.dv) + row * value_dim, dv[r], value_dim, lane);
  }
}

// An element of the bias for `lanes` (1 or 32) threads, which share what it was broadcast over.
template <class T>
__global__ void __launch_bounds__(128)
    bias(AttentionBackwardArgs f, const float* delta, int64_t elements, int lanes, FaultRecord* record) {
  const AttentionArgs& a = f.in;
  const int64_t full[4] = {a.batch, a.heads, a.queries, a.keys},
                thread = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  const int64_t element = thread / lanes, group = a.heads / a.kv_heads;
  float sum = 0;
  if (element < elements) {
    int64_t from[4], over[4], rest = element, count = 1;  // the part of each axis that is this element's
    for (int i = 3; i >= 0; i--) {
      const int64_t size = f.dbias_size[i];
      over[i] = size == 1 ? full[i] : 1;
      from[i] = size == 1 ? 0 : rest % size;
      rest /= size;
      count *= over[i];
    }
    for (int64_t c = thread % lanes; c < count; c += lanes) {
      int64_t at[4], left = c;
      for (int i = 3; i >= 0; i--) {
        at[i] = from[i] + left % over[i];
        left /= over[i];
      }
      const Tile t = tile_of(a, at[0], at[1] / group, at[2] * group + at[1] % group, 1, record);
      const RowMask mask = mask_of(a, t, 0);
      if (at[3] < mask.range.lo || at[3] >= mask.range.hi) continue;
      const float product = dot(query_at<T>(a.q, a.q_step, t, 0), key_at<T>(a, a.k, a.k_step, t, at[3], record), a.dim);
      const float dweight =
          dot(query_at<T>(f.dout, f.dout_step, t, 0), key_at<T>(a, a.v, a.v_step, t, at[3], record), a.value_dim);
      const Kept kept{f.lse[lse_at(a, t, 0)], delta[lse_at(a, t, 0)]};
      sum += gradients_of(f, t, mask, kept, at[3], product, dweight).score;
    }
  }
  if (lanes == kWarp) sum = warp_sum(sum);
  if (element < elements && thread % lanes == 0) put_at(f.dbias, a.bias_dtype, element, sum);
}

}  // namespace

void attention_backward(const AttentionBackwardArgs& f, const Work& work) {
  const AttentionArgs& a = f.in;
  if (a.heads == 0 || a.batch == 0) return;
  const int64_t rows = a.batch * a.heads * a.queries, heads = a.batch * a.kv_heads;
  const Scratch delta(work, rows * sizeof(float));
  FaultRecord* const record = fault_record(work.device);
  const int64_t widest = std::max(a.dim, a.value_dim);
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto run = [&](auto kernel, int64_t tiles) {
      launch(kernel, {heads * tiles}, dim3(kWarps * kWarp), shared_bytes(a), work, f, delta.as<const float>(), tiles,
             record);
    };
    launch(set_delta<T>, {blocks_for(divided_up(rows, 4))}, dim3(128), 0, work, f, delta.as<float>());
    if (f.dq) run(a.dim <= 128 ? queries<T, 4> : queries<T, 8>, divided_up(a.queries * (a.heads / a.kv_heads), kOwn));
    if (f.dk) run(widest <= 128 ? keys<T, 4> : keys<T, 8>, divided_up(a.keys, kOwn));
    if (!f.dbias) return;
    int64_t elements = 1;
    for (const int64_t size : f.dbias_size) elements *= size;
    if (elements == 0) return;
    const int lanes = a.batch * a.heads * a.queries * a.keys / elements >= kWarp ? kWarp : 1;
    launch(bias<T>, {divided_up(elements * lanes, 128)}, dim3(128), 0, work, f, delta.as<const float>(), elements,
           lanes, record);
  });
}

}  // namespace pyllm::cuda

// Attention, backward. bfloat16 and float16 go through matrix instructions where shapes and strides allow
// (attention_backward_mma.cu, and attention_bias_mma.cu for a bias); everything else, float32 first of all, through this
// file's kernels, in float32 throughout, by threads alone: the weights are computed again from the scores and the sums
// that forward kept. One kernel takes 16 rows and walks the keys that they see, for the gradient of the queries; one takes
// 16 keys and walks the rows that see them, for those of keys and values; one takes an element of the bias and adds up
// whatever it was broadcast over. None of them adds to what another block writes, so the sums have one order.
#include <type_traits>

#include "cuda/attention.h"
#include "cuda/attention_rows.h"

namespace pyllm::cuda {
namespace {

constexpr int kOwn = 16, kOther = 32, kWarps = 4, kEach = kOwn / kWarps;  // a warp's rows or keys

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

// A block: 16 rows (or keys) that its warps own, and 32 of the other side that the lanes take, of two kinds each, as
// floats in shared memory: queries and the gradients of their results, keys and values.
template <class T>
struct Block {
  const AttentionBackwardArgs& f;
  const AttentionArgs& a;
  const int dim, value_dim, lane, warp;
  const Place at;
  const int64_t length;
  const float* const delta;
  FaultRecord* const record;
  float *own, *own_values, *other, *other_values;  // rows of `other` are one more than their size apart, for the banks

  __device__ Block(const AttentionBackwardArgs& args, const float* deltas, int64_t tiles, FaultRecord* faults)
      : f(args),
        a(args.in),
        dim(static_cast<int>(a.dim)),
        value_dim(static_cast<int>(a.value_dim)),
        lane(threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp),
        at(place_of(a, tiles)),
        length(length_of(a, at.batch, faults)),
        delta(deltas),
        record(faults) {
    own = reinterpret_cast<float*>(shared_memory());
    own_values = own + kOwn * dim;
    other = own_values + kOwn * value_dim;
    other_values = other + kOther * (dim + 1);
  }

  __device__ Tile rows(int64_t first, int64_t most) const {
    return tile_of(a, at.batch, at.kv_head, first, most, length);
  }
  __device__ Kept kept(const Tile& t, int row) const {
    return row < t.count ? Kept{f.lse[lse_at(a, t, row)], delta[lse_at(a, t, row)]} : Kept{0, 0};
  }
  __device__ void load_rows(const Tile& t, float* q, float* dout, int gap) const {
    const int count = static_cast<int>(t.count);
    load(q, count, dim, gap, [&](int i) { return query_at<T>(a.q, a.q_step, t, i); });
    load(dout, count, value_dim, gap, [&](int i) { return query_at<T>(f.dout, f.dout_step, t, i); });
  }
  __device__ void load_keys(const Tile& t, int64_t first, int count, float* k, float* v, int gap) const {
    load(k, count, dim, gap, [&](int j) { return key_at<T>(a, a.k, a.k_step, t, first + j, record); });
    load(v, count, value_dim, gap, [&](int j) { return key_at<T>(a, a.v, a.v_step, t, first + j, record); });
  }
  template <class F>
  __device__ static void load(float* to, int count, int size, int gap, const F& row_of) {
    for (int i = threadIdx.x; i < count * size; i += blockDim.x)
      to[i / size * (size + gap) + i % size] = to_float(row_of(i / size)[i % size]);
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
  const Block<T> b(f, delta, tiles, record);
  const Tile t = b.rows((tiles - 1 - b.at.tile) * kOwn, kOwn);
  const Range range = seen_by_some(f.in, t);
  const int rows = static_cast<int>(t.count);
  b.load_rows(t, b.own, b.own_values, 0);
  RowMask masks[kEach];
  Kept kept[kEach];
  float dq[kEach][kWide] = {};
#pragma unroll
  for (int r = 0; r < kEach; r++) {
    masks[r] = mask_of(f.in, t, b.warp + r * kWarps);
    kept[r] = b.kept(t, b.warp + r * kWarps);
  }
  for (int64_t first = range.lo / kOther * kOther; first < range.hi; first += kOther) {
    const int count = static_cast<int>(t.length - first < kOther ? t.length - first : kOther);
    __syncthreads();
    b.load_keys(t, first, count, b.other, b.other_values, 1);
    __syncthreads();
    float products[kEach], dweights[kEach];
    multiply(b.own, b.other, b.dim, b.warp, b.lane, rows, count, products);
    multiply(b.own_values, b.other_values, b.value_dim, b.warp, b.lane, rows, count, dweights);
#pragma unroll
    for (int r = 0; r < kEach; r++) {
      if (b.warp + r * kWarps >= rows) continue;
      float d = 0;
      if (b.lane < count) d = gradients_of(f, t, masks[r], kept[r], first + b.lane, products[r], dweights[r]).product;
      add_rows(d, b.other, b.dim, b.lane, count, dq[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kEach; r++) {
    const int row = b.warp + r * kWarps;
    if (row < rows) write_row(reinterpret_cast<T*>(f.dq) + out_row(f.in, t, row) * b.dim, dq[r], b.dim, b.lane);
  }
}

template <class T, int kWide>  // kWide * 32: at least dim and value_dim
__global__ void __launch_bounds__(kWarps* kWarp)
    keys(AttentionBackwardArgs f, const float* delta, int64_t tiles, FaultRecord* record) {
  const AttentionArgs& a = f.in;
  const Block<T> b(f, delta, tiles, record);
  const int64_t first = b.at.tile * kOwn, group = a.heads / a.kv_heads;
  const int own = static_cast<int>(a.keys - first < kOwn ? a.keys - first : kOwn);
  const int live = static_cast<int>(b.length - first < own ? b.length - first : own);  // none where negative
  const Range range = queries_that_see(a, b.length, first, first + own);
  b.load_keys(b.rows(0, 1), first, live, b.own, b.own_values, 0);
  float dk[kEach][kWide] = {}, dv[kEach][kWide] = {};
  for (int64_t first_row = range.lo * group / kOther * kOther; first_row < range.hi * group; first_row += kOther) {
    const Tile t = b.rows(first_row, kOther);
    const int rows = static_cast<int>(t.count);
    __syncthreads();
    b.load_rows(t, b.other, b.other_values, 1);
    __syncthreads();
    const RowMask mask = mask_of(a, t, b.lane);
    const Kept kept = b.kept(t, b.lane);
    float products[kEach], dweights[kEach];
    multiply(b.own, b.other, b.dim, b.warp, b.lane, live, rows, products);
    multiply(b.own_values, b.other_values, b.value_dim, b.warp, b.lane, live, rows, dweights);
#pragma unroll
    for (int r = 0; r < kEach; r++) {
      const int key = b.warp + r * kWarps;
      if (key >= live) continue;
      Gradients g{0, 0, 0};
      if (b.lane < rows) g = gradients_of(f, t, mask, kept, first + key, products[r], dweights[r]);
      add_rows(g.product, b.other, b.dim, b.lane, rows, dk[r]);
      add_rows(g.weight, b.other_values, b.value_dim, b.lane, rows, dv[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kEach; r++) {
    const int key = b.warp + r * kWarps;
    if (key >= own) continue;
    const int64_t row = (b.at.batch * a.keys + first + key) * a.kv_heads + b.at.kv_head;
    write_row(reinterpret_cast<T*>(f.dk) + row * b.dim, dk[r], b.dim, b.lane);
    write_row(reinterpret_cast<T*>(f.dv) + row * b.value_dim, dv[r], b.value_dim, b.lane);
  }
}

// An element of the bias for `lanes` (1 or 32) threads, which share what it was broadcast over.
template <class T>
__global__ void __launch_bounds__(128)
    bias(AttentionBackwardArgs f, const float* delta, int64_t elements, int lanes, FaultRecord* record) {
  const AttentionArgs& a = f.in;
  const int64_t full[4] = {a.batch, a.heads, a.queries, a.keys},
                thread = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  const int64_t element = thread / lanes;
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
      const Tile t = tile_of_head(a, at[0], at[1], at[2], 1, length_of(a, at[0], record));
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
  int64_t elements = f.dbias ? 1 : 0;  // of the bias
  for (const int64_t size : f.dbias_size) elements *= size;
  if (a.batch * a.heads == 0) return set_zero(f.dbias, elements * size_of(a.bias_dtype), work);
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
    if (!backward_by_matrices(f, delta.as<const float>(), work)) {
      if (f.dq) run(a.dim <= 128 ? queries<T, 4> : queries<T, 8>, divided_up(a.queries * (a.heads / a.kv_heads), kOwn));
      if (f.dk) run(widest <= 128 ? keys<T, 4> : keys<T, 8>, divided_up(a.keys, kOwn));
    }
    if (elements == 0 || bias_by_matrices(f, delta.as<const float>(), work)) return;
    const int lanes = a.batch * a.heads * a.queries * a.keys / elements >= kWarp ? kWarp : 1;
    launch(bias<T>, {divided_up(elements * lanes, 128)}, dim3(128), 0, work, f, delta.as<const float>(), elements,
           lanes, record);
  });
}

}  // namespace pyllm::cuda

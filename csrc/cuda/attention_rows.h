// What attention's kernels share: rows, the keys that each sees, and scores.
//
// A row is a (query, head of the group) pair, the head running faster, so that the heads that read one key/value head
// share every key that is loaded. Keys are walked in tiles counted from key 0. Scores are in units of log 2. A masked
// key has the score -infinity and adds exactly nothing, so a row's bits do not depend on its neighbours in a tile. Where
// few rows meet many keys, keys are cut into splits, which become blocks of their own, merged in order. Their borders are
// fixed by the number of key/value heads: what a row gets depends on how many queries its sequence has, but neither on the
// batch nor on how many keys there is room for.
#pragma once
#include "args/attention.h"
#include "cuda/numbers.h"

namespace pyllm::cuda {

constexpr float kLog2e = 1.44269504088896341f;
constexpr int64_t kFewRows = 64;  // rows of a sequence's key/value head up to which keys are split
// Keys of a split: a few thousand keys of one sequence make blocks for every multiprocessor of the largest GPUs.
inline int64_t split_of(const AttentionArgs& a) { return a.kv_heads <= 4 ? 64 : a.kv_heads <= 8 ? 128 : 256; }

// One result of a split: a row's maximum, the sum of its exponentials and that of its values, not yet divided.
struct Partials {
  float *max, *sum,
      *values;           // (batch, kv_heads, rows, splits), the last times value_dim; all null where keys are whole
  int64_t splits, keys;  // keys: of a split
};

// Where a block stands: blocks of a split run fastest, then tiles of rows or keys, then key/value heads.
struct Place {
  int64_t batch, kv_head, tile, split;
};
__device__ __forceinline__ Place place_of(const AttentionArgs& a, int64_t tiles, int64_t splits = 1) {
  const int64_t head = blockIdx.x / splits / tiles;
  return {head / a.kv_heads, head % a.kv_heads, blockIdx.x / splits % tiles, blockIdx.x % splits};
}

struct Tile {  // rows first..first + count of a key/value head, or of one head alone
  int64_t batch, kv_head, first_head, first, count;
  int64_t length;       // keys that count
  int64_t first_query;  // of the first row
  uint32_t group, offset;

  __device__ int64_t query(int i) const { return first_query + (offset + i) / group; }
  __device__ int64_t head(int i) const { return first_head + (offset + i) % group; }
};

__device__ __forceinline__ int64_t length_of(const AttentionArgs& a, int64_t batch, FaultRecord* record) {
  if (!a.key_lengths) return a.keys;
  const int64_t n = integer_at(a.key_lengths, a.length_dtype, batch), most = a.bias ? a.bias_keys : a.keys;
  if (n >= 0 && n <= most) return n;
  report(record, Fault::key_length, batch, n, most);
  return n < 0 ? 0 : most;
}

__device__ __forceinline__ Tile tile_of(const AttentionArgs& a, int64_t batch, int64_t kv_head, int64_t first,
                                        int64_t most, int64_t length) {
  const int64_t group = a.heads / a.kv_heads, rows = a.queries * group, query = first / group;
  return {batch,
          kv_head,
          kv_head * group,
          first,
          rows - first < most ? rows - first : most,
          length,
          query,
          static_cast<uint32_t>(group),
          static_cast<uint32_t>(first - query * group)};
}
// Queries first..first + most of one head.
__device__ __forceinline__ Tile tile_of_head(const AttentionArgs& a, int64_t batch, int64_t head, int64_t first,
                                             int64_t most, int64_t length) {
  const int64_t count = a.queries - first < most ? a.queries - first : most;
  return {batch, head / (a.heads / a.kv_heads), head, first, count, length, first, 1, 0};
}

// Keys [lo, hi) that a query sees, segments apart; both rise with the query. None where lo >= hi.
struct Range {
  int64_t lo, hi;
};
__device__ __forceinline__ Range visible(const AttentionArgs& a, int64_t length, int64_t query) {
  const int64_t last = length - a.queries + query;  // the key that a causal query stands at
  Range r{0, length};
  if (a.causal && last + 1 < r.hi) r.hi = last + 1;
  if (a.window && last - a.window + 1 > r.lo) r.lo = last - a.window + 1;
  if (a.window && !a.causal && last + a.window < r.hi) r.hi = last + a.window;
  return r;
}
// That some row of the tile sees, and that all of its rows see.
__device__ __forceinline__ Range seen_by_some(const AttentionArgs& a, const Tile& t) {
  return {visible(a, t.length, t.query(0)).lo, visible(a, t.length, t.query(static_cast<int>(t.count) - 1)).hi};
}
__device__ __forceinline__ Range seen_by_all(const AttentionArgs& a, const Tile& t) {
  return {visible(a, t.length, t.query(static_cast<int>(t.count) - 1)).lo, visible(a, t.length, t.query(0)).hi};
}
// Of these, the keys of a split.
__device__ __forceinline__ Range seen_in_split(const AttentionArgs& a, const Tile& t, const Partials& p,
                                               int64_t split) {
  Range r = seen_by_some(a, t);
  if (!p.max) return r;
  if (r.lo < split * p.keys) r.lo = split * p.keys;
  if (r.hi > (split + 1) * p.keys) r.hi = (split + 1) * p.keys;
  return r;
}
// The queries that see some key of [first, last); none where lo >= hi.
__device__ __forceinline__ Range queries_that_see(const AttentionArgs& a, int64_t length, int64_t first, int64_t last) {
  const int64_t before = length - a.queries;  // the key that query 0 stands at
  if (last > length) last = length;
  Range r{0, first < last ? a.queries : 0};
  if (a.causal && first - before > r.lo) r.lo = first - before;
  if (a.window && !a.causal && first - before - a.window + 1 > r.lo) r.lo = first - before - a.window + 1;
  if (a.window && last - before + a.window - 1 < r.hi) r.hi = last - before + a.window - 1;
  return r;
}

// Where key j of k, or value j of v, begins; null where the page table names no page.
template <class T>
__device__ __forceinline__ const T* key_at(const AttentionArgs& a, const char* data, const int64_t* step, const Tile& t,
                                           int64_t j, FaultRecord* record) {
  const T* rows = reinterpret_cast<const T*>(data) + t.kv_head * step[2];
  if (!a.page_table) return rows + t.batch * step[0] + j * step[1];
  const int64_t page = a.page_table[t.batch * a.table_step + j / a.page_size];
  if (page >= 0 && page < a.pages) return rows + page * step[0] + j % a.page_size * step[1];
  report(record, Fault::page, t.batch * a.table_step + j / a.page_size, page, a.pages);
  return nullptr;
}
template <class T>
__device__ __forceinline__ const T* query_at(const char* data, const int64_t* step, const Tile& t, int i) {
  return reinterpret_cast<const T*>(data) + t.batch * step[0] + t.query(i) * step[1] + t.head(i) * step[2];
}

// What a product is multiplied by to be a score (or what tanh takes, with a softcap).
__device__ __forceinline__ float product_factor(const AttentionArgs& a) {
  return a.softcap > 0 ? a.scale / a.softcap : a.scale * kLog2e;
}

struct RowMask {  // of one row
  Range range;
  int64_t query, head, segment;
};
__device__ __forceinline__ RowMask mask_of(const AttentionArgs& a, const Tile& t, int i) {
  if (i >= t.count) return {{0, 0}, 0, 0, 0};
  RowMask m{visible(a, t.length, t.query(i)), t.query(i), t.head(i), 0};
  if (a.query_segments)
    m.segment = integer_at(a.query_segments, a.segment_dtype,
                           t.batch * a.query_segment_step[0] + m.query * a.query_segment_step[1]);
  return m;
}

// The score of a product with key j, -infinity where it is masked. `capped`: tanh's value, with a softcap.
__device__ __forceinline__ float score_of(const AttentionArgs& a, const Tile& t, const RowMask& m, int64_t j,
                                          float product, float& capped) {
  if (j < m.range.lo || j >= m.range.hi) return -INFINITY;
  if (a.query_segments && m.segment != integer_at(a.key_segments, a.segment_dtype,
                                                  t.batch * a.key_segment_step[0] + j * a.key_segment_step[1]))
    return -INFINITY;
  float s = product * product_factor(a);
  if (a.softcap > 0) {
    capped = tanhf(s);
    s = capped * (a.softcap * kLog2e);
  }
  if (a.bias)
    s = fmaf(
        float_at(a.bias, a.bias_dtype,
                 t.batch * a.bias_step[0] + m.head * a.bias_step[1] + m.query * a.bias_step[2] + j * a.bias_step[3]),
        kLog2e, s);
  return s;
}

// Where a row's result goes.
__device__ __forceinline__ int64_t out_row(const AttentionArgs& a, const Tile& t, int i) {
  return (t.batch * a.queries + t.query(i)) * a.heads + t.head(i);
}
__device__ __forceinline__ int64_t lse_at(const AttentionArgs& a, const Tile& t, int i) {
  return (t.batch * a.heads + t.head(i)) * a.queries + t.query(i);
}
__device__ __forceinline__ float finite_or_zero(float m) { return m == -INFINITY ? 0.0f : m; }
// What a row's sum of values is multiplied by.
__device__ __forceinline__ float share_of(float sum) { return sum == 0 ? 0.0f : 1.0f / sum; }
__device__ __forceinline__ float lse_of(float max, float sum) { return sum == 0 ? INFINITY : max + log2f(sum); }

// Of a split's row: (batch, kv_head, row, split).
__device__ __forceinline__ int64_t partial_at(const AttentionArgs& a, const Tile& t, const Partials& p, int i,
                                              int64_t split) {
  return ((t.batch * a.kv_heads + t.kv_head) * a.queries * t.group + t.first + i) * p.splits + split;
}

// Backward: what forward kept of a row, and its sum of gradients times results.
struct Kept {
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

// Of bfloat16 and float16 through matrix instructions (attention_mma.cu, attention_backward_mma.cu, attention_bias_mma.cu);
// false where the shapes or strides are not theirs. delta is (batch, heads, queries).
bool forward_by_warpgroups(const AttentionForwardArgs& f, const Work& work);  // attention_wgmma.cu; keys are whole
bool forward_by_matrices(const AttentionForwardArgs& f, const Partials& partials, const Work& work);
bool backward_by_matrices(const AttentionBackwardArgs& f, const float* delta, const Work& work);
bool bias_by_matrices(const AttentionBackwardArgs& f, const float* delta, const Work& work);

}  // namespace pyllm::cuda

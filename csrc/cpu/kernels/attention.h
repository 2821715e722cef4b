// What attention's forward and backward passes share: which keys a query sees, blocks of keys, panels of queries, the
// register tile, and the scores.
//
// Queries lie across the lanes. A panel holds kLanes rows of one key/value head, transposed: [dim][kLanes]; a row is a
// (query, head of the group) pair, the head running faster, so that grouped heads share every key that is loaded. The
// scores of a panel are S^T [key][kLanes]: keys are broadcast, maxima and sums run down the lanes and never across, and
// keys and values need no packing but a widened, contiguous copy (rows that lie a power of two apart fall into one set
// of the cache).
//
// A score is one chain of fused multiply-adds over dim, in order; softcap and bias follow; all in units of log 2, as
// the factor log2(e) rides on the queries. A masked key has the score -infinity, and adds exactly nothing. So a row's
// bits do not depend on its neighbours in the panel, nor on how far beyond its last key the block reaches.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cpu/attention.h"
#include "cpu/kernels/functions.h"

namespace pyllm::ISA {
namespace {

constexpr int64_t kKeys = kKeyTile;                     // keys of a block; blocks are counted from key 0
constexpr int64_t kHalf = 32, kHalves = kKeys / kHalf;  // keys that tile registers add to the sums together
constexpr int64_t kLanes = 2 * W;                       // rows of a panel
constexpr int64_t kMaxRows = 256;                       // rows of a tile: some panels that share each block of keys
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
#if ISA_AVX512
constexpr int64_t kRegisterRows = 12;  // rows of a register tile
#else
constexpr int64_t kRegisterRows = 6;
#endif

// 2^x for x <= 128, error below 2 units in the last place; exactly 1 at 0, 0 below -126, NaN stays NaN.
VEC V exp2(V x) {
  const V t = max(set(-126.0f), x);
  const V shifted = t + 12582912.0f;  // the nearest integer sits in the low bits
  const V r = t - (shifted - 12582912.0f);
  V p = set(1.535336188319500e-4f);
  p = fma(p, r, set(1.339887440266574e-3f));
  p = fma(p, r, set(9.618437357674640e-3f));
  p = fma(p, r, set(5.550332471162809e-2f));
  p = fma(p, r, set(2.402264791363012e-1f));
  p = fma(p, r, set(6.931472028550421e-1f));
  p = fma(p, r, set(1.0f));
  return select(x < -126.0f, V{}, p * as_float((as_int(shifted) << 23) + (127 << 23)));
}

// 2^x for x <= 0 or slightly above, to about 17 bits; 0 where that would be denormal, or at -infinity; NaN stays NaN.
VEC V exp2_short(V x) {
#if __AVX512F__
  V r;
  asm("vreduceps $9, %1, %0" : "=v"(r) : "v"(x));  // x less the next integer below
  V p = set(1.342668571e-02f);
  p = fma(p, r, set(5.224247277e-02f));
  p = fma(p, r, set(2.412802130e-01f));
  p = fma(p, r, set(6.930448413e-01f));
  p = fma(p, r, set(1.0f));
  asm("vscalefps %1, %0, %0" : "+v"(p) : "v"(x));
  return p;
#else
  return exp2(x);
#endif
}

VEC V finite_or_zero(V m) { return select(m == -kInfinity, V{}, m); }  // what to subtract when nothing was seen

// c[r][v] = c[r][v] * factor[v] + sum over i, in order, of a[r * a_row + i * a_step] * b[i * b_step + v * W]; without
// a factor c is not read. R rows, N vectors.
template <int R, int N>
void register_tile(const float* a, int64_t a_row, int64_t a_step, int64_t count, const float* b, int64_t b_step,
                   float* c, int64_t c_step, const V* factor) {
  V s[R][N] = {};
  if (factor)
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++) s[r][n] = load(c + r * c_step + n * W) * factor[n];
  for (int64_t i = 0; i < count; i++, a += a_step, b += b_step) {
    V x[N];
    for (int n = 0; n < N; n++) x[n] = load(b + n * W);
    for (int r = 0; r < R; r++) {
      const V y = set(a[r * a_row]);
      for (int n = 0; n < N; n++) s[r][n] = fma(y, x[n], s[r][n]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) store(c + r * c_step + n * W, s[r][n]);
}

template <int N>
void multiply(const float* a, int64_t a_row, int64_t a_step, int64_t rows, int64_t count, const float* b,
              int64_t b_step, float* c, int64_t c_step, const V* factor) {
  using Tile = void (*)(const float*, int64_t, int64_t, int64_t, const float*, int64_t, float*, int64_t, const V*);
  constexpr Tile tiles[] = {register_tile<1, N>,  register_tile<2, N>, register_tile<3, N>, register_tile<4, N>,
                            register_tile<5, N>,  register_tile<6, N>,
#if ISA_AVX512
                            register_tile<7, N>,  register_tile<8, N>, register_tile<9, N>, register_tile<10, N>,
                            register_tile<11, N>, register_tile<12, N>
#endif
  };
  for (int64_t r = 0; r < rows; r += kRegisterRows)
    tiles[std::min(kRegisterRows, rows - r) - 1](a + r * a_row, a_row, a_step, count, b, b_step, c + r * c_step, c_step,
                                                 factor);
}

// `vectors` is 1 or 2.
void multiply(int64_t vectors, const float* a, int64_t a_row, int64_t a_step, int64_t rows, int64_t count,
              const float* b, int64_t b_step, float* c, int64_t c_step, const V* factor) {
  (vectors == 1 ? multiply<1> : multiply<2>)(a, a_row, a_step, rows, count, b, b_step, c, c_step, factor);
}

int64_t read_integer(const char* p, DType dtype, int64_t i) {
  return dtype == DType::i64 ? reinterpret_cast<const int64_t*>(p)[i] : reinterpret_cast<const int32_t*>(p)[i];
}

int64_t length_of(const AttentionArgs& a, int64_t batch) {
  return a.key_lengths ? read_integer(a.key_lengths, a.length_dtype, batch) : a.keys;
}

// What a query is multiplied by, so that its scores come in units of log 2 (or as what tanh takes, with a softcap).
float query_factor(const AttentionArgs& a) { return a.softcap > 0 ? a.scale / a.softcap : a.scale * kLog2e; }

// What products are multiplied by before they become scores, and what scores are multiplied by where an exponential is
// taken. Where no softcap and no bias need the scores themselves, the two are one, and there is no pass for it.
struct Scale {
  float before, after;
};
[[maybe_unused]] Scale scale_of(const AttentionArgs& a) {
  const float factor = query_factor(a);
  return a.softcap > 0 || a.bias || !(factor > 0) ? Scale{factor, 1} : Scale{1, factor};
}

// Keys [lo, hi) that a query sees, segments apart.
struct Range {
  int64_t lo, hi;
  bool meets(int64_t from, int64_t to) const { return lo < to && from < hi; }
};

[[maybe_unused]] Range halves_of(Range live) { return {live.lo / kHalf, (live.hi + kHalf - 1) / kHalf}; }

Range visible(const AttentionArgs& a, int64_t length, int64_t query) {
  const int64_t last = length - a.queries + query;  // the key that a causal query stands at
  Range r{0, length};
  if (a.causal) r.hi = std::min(r.hi, last + 1);
  if (a.window) r.lo = std::max(r.lo, last - a.window + 1);
  if (a.window && !a.causal) r.hi = std::min(r.hi, last + a.window);
  return r.lo < r.hi ? r : Range{0, 0};
}

// Rows first..first+count of the heads head..head+group, all of which read one key/value head.
struct Rows {
  int64_t batch, head, group, kv_head, length, first, count;
  int64_t query(int64_t i) const { return (first + i) / group; }
  int64_t head_of(int64_t i) const { return head + (first + i) % group; }
};

struct Panel {
  int64_t count, vectors;
  Range range;  // of all rows together
  alignas(64) int64_t lo[kLanes], hi[kLanes], segment[kLanes];
  int64_t tightest_lo, tightest_hi;  // every row sees these
  Range segments;                    // least and greatest
  int64_t query[kLanes], head[kLanes];
};

void set_panel(const AttentionArgs& a, const Rows& rows, int64_t first, Panel& p) {
  p.count = std::min(kLanes, rows.count - first);
  p.vectors = p.count <= W ? 1 : 2;
  p.range = {a.keys, 0};
  p.tightest_lo = 0;
  p.tightest_hi = a.keys;
  p.segments = {INT64_MAX, INT64_MIN};
  for (int64_t i = 0; i < p.count; i++) {
    const int64_t row = first + i;
    p.query[i] = rows.query(row);
    p.head[i] = rows.head_of(row);
    const Range r = visible(a, rows.length, p.query[i]);
    p.lo[i] = r.lo;
    p.hi[i] = r.hi;
    if (r.lo < r.hi) p.range = {std::min(p.range.lo, r.lo), std::max(p.range.hi, r.hi)};
    p.tightest_lo = std::max(p.tightest_lo, r.lo);
    p.tightest_hi = std::min(p.tightest_hi, r.hi);
    if (!a.query_segments) continue;
    p.segment[i] = read_integer(a.query_segments, a.segment_dtype,
                                rows.batch * a.query_segment_step[0] + p.query[i] * a.query_segment_step[1]);
    p.segments = {std::min(p.segments.lo, p.segment[i]), std::max(p.segments.hi, p.segment[i])};
  }
  const int64_t last = p.count - 1;
  for (int64_t i = p.count; i < kLanes; i++) {  // lanes beyond are as the last row
    p.query[i] = p.query[last];
    p.head[i] = p.head[last];
    p.lo[i] = p.lo[last];
    p.hi[i] = p.hi[last];
    if (a.query_segments) p.segment[i] = p.segment[last];
  }
}

// Panels of a tile; the range of all of them.
Range set_panels(const AttentionArgs& a, const Rows& rows, Panel* panels) {
  Range all{a.keys, 0};
  for (int64_t i = 0; i < rows.count; i += kLanes) {
    Panel& p = panels[i / kLanes];
    set_panel(a, rows, i, p);
    if (p.range.lo < p.range.hi) all = {std::min(all.lo, p.range.lo), std::max(all.hi, p.range.hi)};
  }
  return all;
}

struct Block {  // keys first..first+count, none beyond the sequence's length
  int64_t first, count;
  int64_t segment[kKeys];
  Range segments;
};

void set_block(const AttentionArgs& a, const Rows& rows, int64_t first, Block& b) {
  b.first = first;
  b.count = std::min(kKeys, rows.length - first);
  b.segments = {INT64_MAX, INT64_MIN};
  if (!a.key_segments) return;
  for (int64_t j = 0; j < b.count; j++) {
    b.segment[j] = read_integer(a.key_segments, a.segment_dtype,
                                rows.batch * a.key_segment_step[0] + (first + j) * a.key_segment_step[1]);
    b.segments = {std::min(b.segments.lo, b.segment[j]), std::max(b.segments.hi, b.segment[j])};
  }
}

// The keys of the block, counted from its first, that some row of the panel may see.
Range live_keys(const AttentionArgs& a, const Panel& p, const Block& b) {
  if (a.key_segments && !(p.segments.lo <= b.segments.hi && b.segments.lo <= p.segments.hi)) return {0, 0};
  const Range r{std::max<int64_t>(0, p.range.lo - b.first), std::min(b.count, p.range.hi - b.first)};
  return r.lo < r.hi ? r : Range{0, 0};
}

// Rows as they are stored, `step` elements apart: number d of row i is numbers * scale, where there are scales.
template <class S>
struct Stored {
  static constexpr bool kScaled = false;
  const S* data;
  int64_t step, dim;

  V numbers(int64_t i, int64_t d, int64_t n) const { return get(data + i * step + d, n); }
  float scale(int64_t, int64_t) const { return 1.0f; }
  V get_row(int64_t i, int64_t d, int64_t n) const { return numbers(i, d, n); }
};

// Of int8 pages it is a head's tile, see args/paging.h. Numbers are asked for from a multiple of four on.
template <>
struct Stored<int8_t> {
  static constexpr bool kScaled = true;
  const int8_t* data;
  int64_t dim;

  V numbers(int64_t i, int64_t d, int64_t n) const {
    int8_t bytes[W] = {};
    for (int64_t j = 0; j < n; j += kInt8Quad)
      std::memcpy(bytes + j, data + int8_at(dim, i, d + j), d + j + kInt8Quad <= dim ? kInt8Quad : dim - d - j);
    return load(bytes);
  }
  float scale(int64_t i, int64_t d) const {
    bf16 s;
    std::memcpy(&s, data + int8_scale_at(dim, i, d), sizeof s);
    return to_float(s);
  }
  V get_row(int64_t i, int64_t d, int64_t n) const { return numbers(i, d, n) * scale(i, d); }
};

// The first `count` rows as contiguous floats; whether all of them are finite.
template <class S>
bool copy_rows(const Stored<S>& source, int64_t count, float factor, float* out, int64_t out_step) {
  const int64_t dim = source.dim;
  V zeros{};
  for (int64_t i = 0; i < count; i++)
    for (int64_t d = 0; d < dim; d += W) {
      const int64_t n = std::min<int64_t>(W, dim - d);
      const V x = source.get_row(i, d, n) * factor;
      zeros = fma(x, V{}, zeros);
      write(out + i * out_step + d, x, n);
    }
  return sum(zeros) == 0;
}

// Of a tile of int8 pages, as it lies: four elements of some rows at a time.
[[maybe_unused]] bool copy_rows(const Stored<int8_t>& source, int64_t count, float factor, float* out,
                                int64_t out_step) {
  const int64_t dim = source.dim;
  float scales[kKeyTile * kInt8Quad];  // each as often as a row has elements at a time; none beyond the last row
  V zeros{};
  for (int64_t d = 0; d < dim; d += kInt8Quad) {
    if (d % kInt8Group == 0)
      for (int64_t i = 0; i < kKeyTile; i++)
        std::fill_n(scales + i * kInt8Quad, kInt8Quad, i < count ? source.scale(i, d) : 0.0f);
    const int64_t n = int8_count(dim, d);
    const int8_t* numbers = source.data + int8_at(dim, 0, d);
    if (n < kInt8Quad) {
      for (int64_t i = 0; i < count; i++)
        for (int64_t e = 0; e < n; e++) {
          const float x = static_cast<float>(numbers[i * n + e]) * scales[i * kInt8Quad] * factor;
          zeros[0] += x * 0.0f;
          out[i * out_step + d + e] = x;
        }
      continue;
    }
    for (int64_t i = 0; i < count; i += W / kInt8Quad) {
      const V x = load(numbers + i * kInt8Quad) * load(scales + i * kInt8Quad) * factor;
      zeros = fma(x, V{}, zeros);
      float rows[W];
      store(rows, x);
      for (int64_t r = 0; r < std::min<int64_t>(W / kInt8Quad, count - i); r++)
        std::memcpy(out + (i + r) * out_step + d, rows + r * kInt8Quad, kInt8Quad * sizeof(float));
    }
  }
  return sum(zeros) == 0;
}

// The panel's rows of x (at row_of(lane), or none beyond the last), times factor, transposed to out[dim][kLanes].
template <class F>
void pack_panel_rows(const Panel& p, int64_t dim, float factor, float* out, const F& row_of) {
  for (int64_t v = 0; v < p.vectors; v++)
    for (int64_t d = 0; d < dim; d += W) {
      const int64_t n = std::min<int64_t>(W, dim - d);
      V x[W];
      for (int64_t l = 0; l < W; l++) x[l] = v * W + l < p.count ? get(row_of(v * W + l) + d, n) * factor : V{};
      transpose(x);
      for (int64_t l = 0; l < n; l++) store(out + (d + l) * kLanes + v * W, x[l]);
    }
}

// The reverse: x[dim][step] times factor[v] to the panel's rows.
template <class F>
void unpack_panel_rows(const Panel& p, int64_t dim, const V* factor, const float* x, int64_t step, const F& row_of) {
  for (int64_t v = 0; v < p.vectors; v++)
    for (int64_t d = 0; d < dim; d += W) {
      const int64_t n = std::min<int64_t>(W, dim - d);
      V rows[W];
      for (int64_t l = 0; l < W; l++) rows[l] = l < n ? load(x + (d + l) * step + v * W) * factor[v] : V{};
      transpose(rows);
      for (int64_t l = 0; l < W && v * W + l < p.count; l++) write(row_of(v * W + l) + d, rows[l], n);
    }
}

// x[key][step], keys of `live`: += factor * (an array of the bias's kind, at element offset(lane) + key * key_step).
template <class F>
void add_transposed(const Panel& p, Range live, const char* data, DType dtype, int64_t key_step, float factor, float* x,
                    int64_t step, const F& offset) {
  with_dtype(dtype, [&](auto* tag) {
    const auto* source = reinterpret_cast<decltype(tag)>(const_cast<char*>(data));
    for (int64_t v = 0; v < p.vectors; v++)
      for (int64_t j = live.lo; j < live.hi; j += W) {
        const int64_t n = std::min<int64_t>(W, live.hi - j);
        V rows[W];
        for (int64_t l = 0; l < W; l++) {
          const auto* row = source + offset(std::min(v * W + l, p.count - 1)) + j * key_step;
          if (key_step == 1) {
            rows[l] = get(row, n);
          } else {
            rows[l] = V{};
            for (int64_t k = 0; k < n; k++) rows[l][k] = to_float(row[k * key_step]);
          }
        }
        transpose(rows);
        for (int64_t l = 0; l < n; l++) {
          float* at = x + (j + l) * step + v * W;
          store(at, fma(rows[l], set(factor), load(at)));
        }
      }
  });
}

int64_t bias_offset(const AttentionArgs& a, int64_t batch, int64_t head, int64_t query, int64_t key) {
  return batch * a.bias_step[0] + head * a.bias_step[1] + query * a.bias_step[2] + key * a.bias_step[3];
}

// From a panel's products s[key][step] to its scores; tanh's value to `capped`, where there is a softcap and the caller
// wants it. Whether some of them are masked.
bool finish_scores(const AttentionArgs& a, const Rows& rows, const Panel& p, const Block& b, Range live, float* s,
                   int64_t step, float* capped) {
  if (a.softcap > 0)
    for (int64_t j = live.lo; j < live.hi; j++)
      for (int64_t v = 0; v < p.vectors; v++) {
        const V t = tanh(load(s + j * step + v * W));
        if (capped) store(capped + j * step + v * W, t);
        store(s + j * step + v * W, t * (a.softcap * kLog2e));
      }
  if (a.bias)
    add_transposed(p, live, a.bias, a.bias_dtype, a.bias_step[3], kLog2e, s, step,
                   [&](int64_t lane) { return bias_offset(a, rows.batch, p.head[lane], p.query[lane], b.first); });
  bool masked = a.bias;
  if (p.tightest_lo > b.first + live.lo || p.tightest_hi < b.first + live.hi) {
    masked = true;
    for (int64_t v = 0; v < p.vectors; v++) {
      VI lo, hi;
      for (int64_t l = 0; l < W; l++) {
        lo[l] = static_cast<int32_t>(std::clamp<int64_t>(p.lo[v * W + l] - b.first, 0, kKeys));
        hi[l] = static_cast<int32_t>(std::clamp<int64_t>(p.hi[v * W + l] - b.first, 0, kKeys));
      }
      for (int64_t j = live.lo; j < live.hi; j++) {
        const VI key = set_int(static_cast<int32_t>(j));
        float* at = s + j * step + v * W;
        store(at, select((key >= lo) & (key < hi), load(at), set(-kInfinity)));
      }
    }
  }
  if (a.key_segments && !(p.segments.lo == p.segments.hi && b.segments.lo == b.segments.hi)) {
    masked = true;
    for (int64_t j = live.lo; j < live.hi; j++)
      for (int64_t l = 0; l < p.vectors * W; l++)
        if (p.segment[l] != b.segment[j]) s[j * step + l] = -kInfinity;
  }
  return masked;
}

// Scores of a panel against the live keys of a block, by fused multiply-adds.
bool score_panel(const AttentionArgs& a, const Rows& rows, const Panel& p, const Block& b, Range live,
                 const float* keys, const float* queries, float* s, int64_t step, float* capped) {
  multiply(p.vectors, keys + live.lo * a.dim, a.dim, 1, live.hi - live.lo, a.dim, queries, kLanes, s + live.lo * step,
           step, nullptr);
  return finish_scores(a, rows, p, b, live, s, step, capped);
}

template <class T>
const T* row_at(const char* data, const int64_t* step, int64_t batch, int64_t position, int64_t head) {
  return reinterpret_cast<const T*>(data) + batch * step[0] + position * step[1] + head * step[2];
}

// k, or v, from key `first` on, where a block begins; the rest of it follows, in the same page where there are pages.
template <class S>
Stored<S> block_at(const AttentionArgs& a, const char* data, const int64_t* step, int64_t dim, const Rows& rows,
                   int64_t first) {
  const int64_t page = a.page_table ? a.page_table[rows.batch * a.table_step + first / a.page_size] : rows.batch;
  const int64_t at = a.page_table ? first % a.page_size : first;
  if constexpr (Stored<S>::kScaled)
    return {row_at<S>(data, step, page, at, rows.kv_head * kKeyTile), dim};
  else
    return {row_at<S>(data, step, page, at, rows.kv_head), step[1], dim};
}
template <class S>
Stored<S> stored_keys(const AttentionArgs& a, const Rows& rows, int64_t first) {
  return block_at<S>(a, a.k, a.k_step, a.dim, rows, first);
}
template <class S>
Stored<S> stored_values(const AttentionArgs& a, const Rows& rows, int64_t first) {
  return block_at<S>(a, a.v, a.v_step, a.value_dim, rows, first);
}

}  // namespace
}  // namespace pyllm::ISA

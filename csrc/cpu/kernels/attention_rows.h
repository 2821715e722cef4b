// Attention, forward, of less than W rows (one query of a group of heads), all of which walk the keys together. Keys lie
// across the lanes for the scores: a panel of them at a time is transposed, once for all rows, into the first-level
// cache. Value elements lie across the lanes for the output, and values are read where they lie; meanwhile the block that
// is walked next is asked for. Sums are added in the order of kernels/attention.cpp.
#pragma once
#include <array>
#include <utility>

#include "cpu/kernels/attention.h"
#include "cpu/kernels/gemm_panels.h"

namespace pyllm::ISA {
namespace {

struct State {  // of a tile; `sums` has [panel][value_dim][kLanes], or [row][value_dim] rounded up when rows are few
  float *max, *total, *sums;
};

// The new maximum m, and what the old state is multiplied by.
VEC V rescale(V old_max, V m) { return exp2(old_max - finite_or_zero(m)); }

float read_float(const char* p, DType dtype, int64_t i) {
  float x = 0;
  with_dtype(dtype, [&](auto* tag) { x = to_float(reinterpret_cast<decltype(tag)>(const_cast<char*>(p))[i]); });
  return x;
}

// The block of keys and values that is walked next: asked for a line at a time, by the second-level cache.
class Ahead {
 public:
  struct Runs {  // of memory, in bytes
    const void* data;
    int64_t count, step, length;
  };

  Ahead() = default;
  Ahead(const Runs& keys, const Runs& values) : at_(keys), next_(values), left_(lines(keys) + lines(values)) {}

  int64_t left() const { return left_; }  // lines
  VEC void ask(int64_t n) {
    for (n = std::min(n, left_), left_ -= n; n > 0; n--) {
      __builtin_prefetch(static_cast<const char*>(at_.data) + offset_, 0, 2);
      offset_ += kLine;
      if (offset_ < at_.length) continue;
      offset_ = 0;
      at_.data = static_cast<const char*>(at_.data) + at_.step;
      if (--at_.count == 0) at_ = next_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  static int64_t lines(const Runs& x) { return x.count * ((x.length + kLine - 1) / kLine); }

  Runs at_{}, next_{};
  int64_t left_ = 0, offset_ = 0;
};

template <class S>
Ahead::Runs runs_of(const Stored<S>& x, int64_t count) {
  constexpr int64_t kBytes = sizeof(S);
  return {x.data, count, x.step * kBytes, x.dim * kBytes};
}
[[maybe_unused]] Ahead::Runs runs_of(const Stored<int8_t>& x, int64_t) {
  return {x.data, 1, 0, kKeys * int8_width(x.dim)};
}

// scores[r][kKeys] of R rows against the keys of N panels, [dim][kPanel] each.
template <int R, int N>
void score_panels(const float* queries, int64_t dim, const float* panels, float* scores) {
  V s[R][2 * N] = {};
  for (int64_t d = 0; d < dim; d++) {
    V x[2 * N];
    UNROLL for (int n = 0; n < N; n++) {
      x[2 * n] = load(panels + n * dim * kPanel + d * kPanel);
      x[2 * n + 1] = load(panels + n * dim * kPanel + d * kPanel + W);
    }
    UNROLL for (int r = 0; r < R; r++) {
      const V q = set(queries[r * dim + d]);
      UNROLL for (int n = 0; n < 2 * N; n++) s[r][n] = fma(q, x[n], s[r][n]);
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int n = 0; n < 2 * N; n++) store(scores + r * kKeys + n * W, s[r][n]);
}

// Of all panels from number `first` on, N at a time, then the half of it.
template <int R, int N>
void score_panels_from(const float* queries, int64_t dim, const float* panels, int64_t first, int64_t end,
                       float* scores) {
  for (; first + N <= end; first += N)
    score_panels<R, N>(queries, dim, panels + first * dim * kPanel, scores + first * kPanel);
  if constexpr (N > 1) score_panels_from<R, N / 2>(queries, dim, panels, first, end, scores);
}

// The same of the keys live, which are transposed in registers.
template <int R, class S>
void score_rows(const float* queries, const Stored<S>& k, Range live, float* scores) {
  constexpr int kGroups = R == 1 ? 4 : R == 2 ? 2 : 1;  // of keys
  for (int64_t j = live.lo; j < live.hi; j += kGroups * W) {
    V s[kGroups][R] = {};
    const auto key = [&](int64_t g, int64_t l) { return std::min(j + g * W + l, live.hi - 1); };
    const auto chunk = [&](int64_t d, int64_t n) __attribute__((always_inline)) {
      for (int g = 0; g < kGroups; g++) {
        V x[W];
        for (int64_t l = 0; l < W; l++) x[l] = k.numbers(key(g, l), d, n);
        transpose(x);
        for (int64_t l = 0; l < n; l++)
          for (int r = 0; r < R; r++) s[g][r] = fma(set(queries[r * k.dim + d + l]), x[l], s[g][r]);
      }
    };
    int64_t d = 0;
    for (; d + W <= k.dim; d += W) chunk(d, W);
    if (d < k.dim) chunk(d, k.dim - d);
    for (int g = 0; g < kGroups; g++)
      for (int r = 0; r < R; r++)
        if (j + g * W < live.hi) store(scores + r * kKeys + j + g * W, s[g][r]);
  }
}

// Some row of the panel may not see some live key.
bool may_mask(const AttentionArgs& a, const Panel& p, const Block& b, Range live) {
  return a.bias || a.key_segments || p.tightest_lo > b.first + live.lo || p.tightest_hi < b.first + live.hi;
}

// From a row's products to its scores, as `finish_scores` does; the largest of each lane.
V finish_row(const AttentionArgs& a, const Rows& rows, const Panel& p, int64_t row, const Block& block, Range live,
             float* x) {
  const Range own{std::clamp<int64_t>(p.lo[row] - block.first, 0, kKeys),
                  std::clamp<int64_t>(p.hi[row] - block.first, 0, kKeys)};
  V top = set(-kInfinity);
  for (int64_t j = live.lo; j < live.hi; j += W) {
    const int64_t n = std::min<int64_t>(W, live.hi - j);
    V score = load(x + j);
    if (a.softcap > 0) score = tanh(score) * (a.softcap * kLog2e);
    if (a.bias) {
      const int64_t offset = bias_offset(a, rows.batch, p.head[row], p.query[row], block.first + j);
      V bias{};
      for (int64_t l = 0; l < n; l++) bias[l] = read_float(a.bias, a.bias_dtype, offset + l * a.bias_step[3]);
      score = fma(bias, set(kLog2e), score);
    }
    const VI key = lane_index() + static_cast<int32_t>(j);
    score =
        select((key >= static_cast<int32_t>(own.lo)) & (key < static_cast<int32_t>(own.hi)), score, set(-kInfinity));
    if (a.key_segments)
      for (int64_t l = 0; l < n; l++)
        if (block.segment[j + l] != p.segment[row]) score[l] = -kInfinity;
    store(x + j, score);
    top = max(score, top);
  }
  return top;
}

// sums[r][d..] = sums[r][d..] * factor[r] + p[r][live] v, of R rows and N vectors of v's elements, or n elements where N is
// 1. kTotal: total[r] likewise, of p[r][live] alone. With each key go `asked` lines of what is ahead.
template <int R, int N, bool kTotal, class S>
void add_values(const float* p, const Stored<S>& v, int64_t d, Range live, int64_t n, const float* factor, float* sums,
                int64_t sums_step, float* total, Ahead& all_ahead, int64_t asked) {
  Ahead ahead = all_ahead;
  V s[R][N];
  float t[R];
  if (kTotal) UNROLL for (int r = 0; r < R; r++) t[r] = total[r] * factor[r];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int i = 0; i < N; i++) s[r][i] =
      load(sums + r * sums_step + d + i * W) * set(factor[r]);
  for (int64_t j = live.lo; j < live.hi; j++) {
    if (asked) ahead.ask(asked);
    V x[N];
    UNROLL for (int i = 0; i < N; i++) x[i] = v.numbers(j, d + i * W, N > 1 ? W : n);
    UNROLL for (int r = 0; r < R; r++) {
      const float w = p[r * kKeys + j];
      UNROLL for (int i = 0; i < N; i++) s[r][i] = fma(set(w), x[i], s[r][i]);
      if (kTotal) t[r] += w;
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int i = 0; i < N; i++)
      store(sums + r * sums_step + d + i * W, s[r][i]);
  if (kTotal) UNROLL for (int r = 0; r < R; r++) total[r] = t[r];
  all_ahead = ahead;
}

// All of the value's elements from d on: N vectors at a time, then fewer.
template <int R, int N, class S>
void add_values_from(const float* p, const Stored<S>& v, int64_t d, Range live, const float* factor, float* sums,
                     int64_t sums_step, float* total, Ahead& ahead, int64_t asked) {
  for (; d + N * W <= v.dim || (N == 1 && d < v.dim); d += N * W)
    (d == 0 ? add_values<R, N, true, S> : add_values<R, N, false, S>)(p, v, d, live, std::min<int64_t>(W, v.dim - d),
                                                                      factor, sums, sums_step, total, ahead, asked);
  if constexpr (N > 1)
    add_values_from<R, N == 4 ? 3 : N == 3 ? 2 : N / 2>(p, v, d, live, factor, sums, sums_step, total, ahead, asked);
}

constexpr int kSums = 2 * kRegisterRows;  // that registers hold

// The two products of R rows: their scores against the panels of a block, and their sums.
template <int R, class S>
struct RowTiles {
  static void score(const float* queries, int64_t dim, const float* panels, int64_t first, int64_t end, float* scores) {
    constexpr int N = R <= kSums / 8 ? 4 : R <= kSums / 4 ? 2 : 1;
    score_panels_from<R, N>(queries, dim, panels, first, end, scores);
  }
  static void add(const float* p, const Stored<S>& v, Range live, const float* factor, float* sums, int64_t sums_step,
                  float* total, Ahead& ahead) {
    constexpr int N = R == 1 ? 8 : R <= kSums / 4 ? 4 : 2;
    const int64_t times = (live.hi - live.lo) * ((v.dim + N * W - 1) / (N * W));
    add_values_from<R, N>(p, v, 0, live, factor, sums, sums_step, total, ahead, (ahead.left() + times - 1) / times);
  }
};

// f(first row, RowTiles of as many rows), over all rows, which registers do not always hold at once.
template <class S, class F>
void each_row_tile(int64_t rows, const F& f) {
  const int64_t tiles = (rows + kRegisterRows - 1) / kRegisterRows, most = (rows + tiles - 1) / tiles;
  for (int64_t r = 0; r < rows; r += most)
    [&]<int... I>(std::integer_sequence<int, I...>) {
      (void)((std::min(most, rows - r) == I + 1 && (f(r, RowTiles<I + 1, S>()), true)) || ...);
    }(std::make_integer_sequence<int, kRegisterRows>());
}

// Sums and total of one row, less the keys that are marked by a negative p.
template <class S>
void add_marked_row(const float* p, const Stored<S>& v, Range live, float factor, float* sums, float* total) {
  for (int64_t j = live.lo; j < live.hi; j++)
    if (!(p[j] < 0)) *total += p[j];
  for (int64_t d = 0; d < v.dim; d += W) {
    V s = load(sums + d) * factor;
    for (int64_t j = live.lo; j < live.hi; j++)
      if (!(p[j] < 0)) s = fma(set(p[j]), v.get_row(j, d, std::min<int64_t>(W, v.dim - d)), s);
    store(sums + d, s);
  }
}

constexpr int64_t kInPlace = W == 16 ? 3 : 4;  // rows that wait for nothing but memory, where keys are floats

// scores[row][kKeys] of all rows against the keys live of a block. Half of what is ahead is asked for as keys are packed;
// nothing where they are not, as the processor looks ahead by itself then.
template <class S>
void score_block(int64_t rows, const float* queries, const Stored<S>& k, Range live, float* panels, float* scores,
                 Ahead& ahead) {
  if constexpr (sizeof(S) == sizeof(float))
    if (rows <= kInPlace) {
      constexpr std::array in_place{score_rows<1, S>, score_rows<2, S>, score_rows<3, S>, score_rows<4, S>};
      in_place[rows - 1](queries, k, live, scores);
      ahead = {};
      return;
    }
  const int64_t first = live.lo / kPanel, end = (live.hi + kPanel - 1) / kPanel;
  const int64_t asked = ahead.left() / 2 / ((end - first) * ((k.dim + kPanel - 1) / kPanel));
  const Matrix keys{k.data, DType::f32, 1, k.step};  // columns of a matrix, whose strides alone are read
  for (int64_t n = first; n < end; n++)
    for (int64_t d = 0; d < k.dim; d += kPanel) {
      pack_panel_down(keys, k.data + n * kPanel * k.step + d, std::min(kPanel, live.hi - n * kPanel),
                      std::min(kPanel, k.dim - d), panels + (n * k.dim + d) * kPanel);
      ahead.ask(asked);
    }
  each_row_tile<S>(rows, [&](int64_t r, auto tile) {
    tile.score(queries + r * k.dim, k.dim, panels, first, end, scores + r * kKeys);
  });
}

// The block of keys from `first` on. `panels` are for its keys.
template <class S>
void walk_rows(const AttentionArgs& a, const Rows& rows, const Panel& p, const float* queries, int64_t first,
               const Stored<S>& k, const Stored<S>& v, float* panels, Ahead ahead, State s) {
  const int64_t sums_step = round_up(a.value_dim, W);
  Block block;
  set_block(a, rows, first, block);
  const Range live = live_keys(a, p, block);
  if (live.lo == live.hi) return;
  const Range lanes{live.lo / W * W, live.hi};
  alignas(64) float x[(W - 1) * kKeys];
  score_block(rows.count, queries, k, lanes, panels, x, ahead);
  const int64_t lines = ahead.left();
  const bool mixed = may_mask(a, p, block, live);
  float factor[W];
  for (int64_t r = 0; r < rows.count; r++) {
    float* scores = x + r * kKeys;
    const V m = max(set(max(finish_row(a, rows, p, r, block, lanes, scores))), set(s.max[r]));
    const V base = finite_or_zero(m);
    factor[r] = rescale(set(s.max[r]), m)[0];
    s.max[r] = m[0];
    for (int64_t j = lanes.lo; j < lanes.hi; j += W) {
      const V score = load(scores + j), e = exp2(score - base);
      store(scores + j, mixed ? select(score == -kInfinity, set(-1.0f), e) : e);
    }
    ahead.ask(lines / 2 / rows.count);
  }
  if (mixed) {
    for (int64_t r = 0; r < rows.count; r++) {
      s.total[r] *= factor[r];
      add_marked_row(x + r * kKeys, v, live, factor[r], s.sums + r * sums_step, s.total + r);
    }
    return;
  }
  each_row_tile<S>(rows.count, [&](int64_t r, auto tile) {
    tile.add(x + r * kKeys, v, live, factor + r, s.sums + r * sums_step, sums_step, s.total + r, ahead);
  });
}

// The same of int8 pages, whose numbers become floats in `keys` and `values` before.
[[maybe_unused]] void walk_rows(const AttentionArgs& a, const Rows& rows, const Panel& p, const float* queries,
                                int64_t first, const Stored<int8_t>& k, const Stored<int8_t>& v, float* keys,
                                float* values, float* panels, State s) {
  const int64_t count = std::min(kKeys, rows.length - first);
  copy_rows(k, count, 1.0f, keys, a.dim);
  copy_rows(v, count, 1.0f, values, a.value_dim);
  const Stored<float> numbers{values, a.value_dim, a.value_dim};
  walk_rows(a, rows, p, queries, first, Stored<float>{keys, a.dim, a.dim}, numbers, panels, {}, s);
}

}  // namespace
}  // namespace pyllm::ISA

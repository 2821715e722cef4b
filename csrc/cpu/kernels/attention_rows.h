// Attention, forward, of less than W rows (one query of a group of heads): keys lie across the lanes for the scores,
// transposed in registers on their way from memory, and value elements for the output, so that keys and values are read
// once and nothing is copied. Sums are added in the order of kernels/attention.cpp.
#pragma once
#include <array>

#include "cpu/kernels/attention.h"

namespace pyllm::ISA {
namespace {

constexpr int64_t kFewRows = 4;  // rows that walk the keys together

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

// scores[r][j] of R rows against keys live of a block: kGroups vectors of keys at a time.
template <int R, class S>
void score_rows(const float* queries, const Stored<S>& k, Range live, float* scores) {
  constexpr int kGroups = R == 1 ? 4 : R == 2 ? 2 : 1;
  for (int64_t j = live.lo; j < live.hi; j += kGroups * W) {
    V s[kGroups][R] = {}, scale[kGroups] = {};
    const auto key = [&](int64_t g, int64_t l) { return std::min(j + g * W + l, live.hi - 1); };
    const auto chunk = [&](int64_t d, int64_t n) __attribute__((always_inline)) {
      for (int g = 0; g < kGroups; g++) {
        V x[W];
        for (int64_t l = 0; l < W; l++) x[l] = k.numbers(key(g, l), d, n);
        transpose(x);
        if (k.kScaled && d % kInt8Group == 0)
          for (int64_t l = 0; l < W; l++) scale[g][l] = k.scale(key(g, l), d);
        for (int64_t l = 0; l < n; l++) {
          if constexpr (k.kScaled) x[l] = x[l] * scale[g];
          for (int r = 0; r < R; r++) s[g][r] = fma(set(queries[r * k.dim + d + l]), x[l], s[g][r]);
        }
      }
    };
    int64_t d = 0;
    for (; d + W <= k.dim; d += W) chunk(d, W);
    if (d < k.dim) chunk(d, k.dim - d);
    for (int g = 0; g < kGroups; g++)
      for (int r = 0; r < R; r++)
        if (j + g * W < live.hi) store(scores + r * 2 * kKeys + j + g * W, s[g][r]);
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

// sums[r] * factor[r] + p[r][live] v, of v's elements from d on, N vectors wide, or n elements where N is 1. kTotal:
// total[r] too.
template <int R, int N, bool kTotal, class S>
VEC void add_values(const float* p, const Stored<S>& v, int64_t d, Range live, int64_t n, const float* factor,
                    float* sums, int64_t sums_step, float* total) {
  V s[R][N];
  float t[R];
  for (int r = 0; r < R; r++) {
    for (int i = 0; i < N; i++) s[r][i] = load(sums + r * sums_step + i * W) * set(factor[r]);
    if (kTotal) t[r] = total[r];
  }
  for (int64_t j = live.lo; j < live.hi; j++) {
    V x[N], scale{};
    for (int i = 0; i < N; i++) {
      x[i] = v.numbers(j, d + i * W, N > 1 ? W : n);
      if (v.kScaled && i * W % kInt8Group == 0) scale = set(v.scale(j, d + i * W));
      if constexpr (v.kScaled) x[i] = x[i] * scale;
    }
    for (int r = 0; r < R; r++) {
      const float w = p[r * 2 * kKeys + j];
      for (int i = 0; i < N; i++) s[r][i] = fma(set(w), x[i], s[r][i]);
      if (kTotal) t[r] += w;
    }
  }
  for (int r = 0; r < R; r++) {
    for (int i = 0; i < N; i++) store(sums + r * sums_step + i * W, s[r][i]);
    if (kTotal) total[r] = t[r];
  }
}

// All of the value's elements from d on, N vectors at a time, then the half of it.
template <int R, int N, class S>
void add_values_from(int64_t dim, const float* p, const Stored<S>& v, int64_t d, Range live, const float* factor,
                     float* sums, int64_t sums_step, float* total) {
  for (; d + N * W <= dim || (N == 1 && d < dim); d += N * W)
    (d == 0 ? add_values<R, N, true, S> : add_values<R, N, false, S>)(p, v, d, live, std::min<int64_t>(W, dim - d),
                                                                      factor, sums + d, sums_step, total);
  if constexpr (N > 1) add_values_from<R, N / 2>(dim, p, v, d, live, factor, sums, sums_step, total);
}

// The same for one row, less the keys that are marked by a negative p.
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

template <int R, class S>
void walk_few(const AttentionArgs& a, const Rows& rows, const Panel& p, int64_t r0, const float* queries, int64_t first,
              const Stored<S>& k, const Stored<S>& v, State s) {
  constexpr int kWide = R == 1 ? 8 : R == 2 ? 4 : 2;
  const int64_t sums_step = round_up(a.value_dim, W);
  Block block;
  set_block(a, rows, first, block);
  const Range live = live_keys(a, p, block);
  if (live.lo == live.hi) return;
  alignas(64) float x[R][2 * kKeys];
  score_rows<R>(queries + r0 * a.dim, k, live, &x[0][0]);
  const bool mixed = may_mask(a, p, block, live);
  float factor[R];
  for (int r = 0; r < R; r++) {
    const int64_t row = r0 + r;
    const V m = max(set(max(finish_row(a, rows, p, row, block, live, x[r]))), set(s.max[row]));
    const V base = finite_or_zero(m);
    factor[r] = rescale(set(s.max[row]), m)[0];
    s.max[row] = m[0];
    for (int64_t j = live.lo; j < live.hi; j += W) {
      const V score = load(x[r] + j), e = exp2(score - base);
      store(x[r] + j, mixed ? select(score == -kInfinity, set(-1.0f), e) : e);
    }
    s.total[row] *= factor[r];
  }
  float *sums = s.sums + r0 * sums_step, *total = s.total + r0;
  if (mixed) {
    for (int r = 0; r < R; r++) add_marked_row(x[r], v, live, factor[r], sums + r * sums_step, total + r);
    return;
  }
  add_values_from<R, kWide>(a.value_dim, &x[0][0], v, 0, live, factor, sums, sums_step, total);
}

template <class S>
void walk_rows(const AttentionArgs& a, const Rows& rows, const Panel& p, const float* queries, int64_t first,
               const Stored<S>& k, const Stored<S>& v, State s) {
  for (int64_t r = 0; r < rows.count; r += kFewRows) {
    const auto walk = std::array{walk_few<1, S>, walk_few<2, S>, walk_few<3, S>, walk_few<4, S>};
    walk[std::min(kFewRows, rows.count - r) - 1](a, rows, p, r, queries, first, k, v, s);
  }
}

// The block of keys from `first` on; those of int8 pages become floats in `keys` and `values` before.
template <class S>
void walk_rows(const AttentionArgs& a, const Rows& rows, const Panel& p, const float* queries, int64_t first,
               [[maybe_unused]] float* keys, [[maybe_unused]] float* values, State s) {
  const Stored<S> k = stored_keys<S>(a, rows, first), v = stored_values<S>(a, rows, first);
  if constexpr (!Stored<S>::kScaled)
    return walk_rows(a, rows, p, queries, first, k, v, s);
  else {
    const int64_t count = std::min(kKeys, rows.length - first);
    copy_rows(k, count, 1.0f, keys, a.dim);
    copy_rows(v, count, 1.0f, values, a.value_dim);
    walk_rows(a, rows, p, queries, first, Stored<float>{keys, a.dim, a.dim},
              Stored<float>{values, a.value_dim, a.value_dim}, s);
  }
}

}  // namespace
}  // namespace pyllm::ISA

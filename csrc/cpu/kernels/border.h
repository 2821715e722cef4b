// A weighted selection without a sort: the smallest t such that the weights of the keys above t sum to less than a target.
// Bisection by sums over the list; after a few steps the keys outside of the bracket leave the list. The number of steps
// is bounded by the bits of a float, and the order of the sums is fixed by the list.
#pragma once
#include "cpu/kernels/vec.h"

namespace pyllm::ISA {
namespace {

constexpr float kLowest = -3.4028234664e38f;

template <class T>
VEC V get_or_lowest(const T* p, int64_t n) {
  return n == W ? load(p) : load_n(p, n, -kInfinity);
}

template <class F>
VEC void each(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + W <= end; i += W) f(i, W);
  if (i < end) f(i, end - i);
}

// Floats and integers in the same order; its own inverse.
[[maybe_unused]] int32_t ordered(float x) {
  int32_t i;
  std::memcpy(&i, &x, 4);
  return i ^ ((i >> 31) & 0x7fffffff);
}
[[maybe_unused]] float unordered(int32_t i) {
  i ^= (i >> 31) & 0x7fffffff;
  float x;
  std::memcpy(&x, &i, 4);
  return x;
}

struct List {
  float *keys, *weights;  // weights: null means 1 each
  int64_t n;
};

VEC V weight_at(const List& l, int64_t i, int64_t n) { return l.weights ? get(l.weights + i, n) : set(1.0f); }

[[maybe_unused]] double weight_above(const List& l, float t) {
  V s0{}, s1{}, s2{}, s3{};
  const auto above = [&](V s, int64_t i, int64_t n) {
    return s + select(get_or_lowest(l.keys + i, n) > t, weight_at(l, i, n), V{});
  };
  int64_t i = 0;
  for (; i + 4 * W <= l.n; i += 4 * W) {
    s0 = above(s0, i, W);
    s1 = above(s1, i + W, W);
    s2 = above(s2, i + 2 * W, W);
    s3 = above(s3, i + 3 * W, W);
  }
  each(i, l.n, [&](int64_t j, int64_t n) { s0 = above(s0, j, n); });
  return sum((s0 + s1) + (s2 + s3));
}

// The smallest t such that the keys above t weigh less than `target` (> 0): one of the keys, or the least of them where
// all weigh less. `spare` has room for l.n keys and weights.
[[maybe_unused]] float border(List l, double target, List spare) {
  double above = 0;                           // the weight of the keys that have left the list at its upper end
  int64_t low = INT32_MIN, high = INT32_MAX;  // the answer, as an integer, is in (low, high]
  for (int pass = 0;; pass++) {
    V least = set(kInfinity), most = set(-kInfinity);
    each(0, l.n, [&](int64_t i, int64_t n) {
      const V k = get_or_lowest(l.keys + i, n);
      most = max(k, most);
      least = min(n == W ? k : keep(k, n, kInfinity), least);
    });
    const float bottom = -max(-least), top = max(most);
    if (low < ordered(bottom)) low = static_cast<int64_t>(ordered(bottom)) - 1;
    if (high > ordered(top)) high = ordered(top);
    double above_high = above;
    // Halving the difference is quick for smooth keys; halving the number of floats between ends for any.
    for (int step = 0; step < 6 && high - low > 1; step++) {
      int64_t middle = low + (high - low) / 2;
      if (pass < 2 && bottom >= kLowest) {
        const float from = low < ordered(bottom) ? bottom : unordered(static_cast<int32_t>(low));
        middle = ordered(0.5f * from + 0.5f * unordered(static_cast<int32_t>(high)));
        middle = middle <= low ? low + 1 : middle >= high ? high - 1 : middle;
      }
      const double weight = above + weight_above(l, unordered(static_cast<int32_t>(middle)));
      if (weight < target) {
        high = middle;
        above_high = weight;
      } else {
        low = middle;
      }
    }
    if (high - low <= 1) return unordered(static_cast<int32_t>(high));
    int64_t kept = 0;
    const int32_t from = static_cast<int32_t>(low + 1);
    const float lowest = unordered(from), highest = unordered(static_cast<int32_t>(high));
    each(0, l.n, [&](int64_t i, int64_t n) {
      const V k = get_or_lowest(l.keys + i, n);
      for (uint32_t lanes = bits((k >= lowest) & (k <= highest) & (lane_index() < static_cast<int32_t>(n))); lanes;
           lanes &= lanes - 1) {
        const int64_t at = i + __builtin_ctz(lanes);
        spare.keys[kept] = l.keys[at];
        if (l.weights) spare.weights[kept] = l.weights[at];
        kept++;
      }
    });
    if (kept == 0) return highest;
    l = {spare.keys, l.weights ? spare.weights : nullptr, kept};
    above = above_high;
  }
}

}  // namespace
}  // namespace pyllm::ISA

// What the forward and backward passes of RWKV-7's recurrence share: the steps of some columns of a head's state.
//
// The state is S (keys x values). A step of it is
//     s = S' a                          (a row: one number a value)
//     S = diag(exp(w)) S + b s + k v    (the products are outer ones)
//     y = S' r
// Values lie across the lanes and never mix; keys are walked in order, each with its five numbers of the step broadcast.
// So the sums s and y are one chain of fused multiply-adds over the keys, the same for any columns that are computed
// together. The walk that makes S and y also makes the next step's s, and the state is read and written once a step.
#pragma once
#include <algorithm>

#include "cpu/kernels/functions.h"
#include "cpu/wkv.h"

namespace pyllm::ISA {
namespace {

#if ISA_AVX512
constexpr int kWide = 4;  // vectors of columns that are computed together
#else
constexpr int kWide = 2;
#endif
enum Factor { kDecay, kA, kB, kK, kR, kFactors };

template <class F>
VEC void each(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, W);
  if (i < n) f(i, n - i);
}

template <class T>
const T* row_of(const WkvInput& x, int64_t batch, int64_t time, int64_t head) {
  return reinterpret_cast<const T*>(x.data) + batch * x.batch + time * x.time + head * x.head;
}

int64_t length_of(const WkvShape& s, int64_t batch) { return s.lengths ? s.lengths[batch] : s.time; }

// The factors of steps first..first+count, widened: [step][kFactors][dim].
template <class T>
void widen_factors(const WkvShape& s, int64_t batch, int64_t head, int64_t first, int64_t count, float* out) {
  for (int64_t t = first; t < first + count; t++) {
    const WkvInput* const inputs[] = {&s.w, &s.a, &s.b, &s.k, &s.r};
    for (int f = 0; f < kFactors; f++, out += s.dim) {
      const T* source = row_of<T>(*inputs[f], batch, t, head);
      each(s.dim, [&](int64_t i, int64_t n) {
        const V x = get(source + i, n);
        write(out + i, f == kDecay ? exp(x) : x, n);
      });
    }
  }
}

// Some columns of a head's state, over steps that follow each other. Rows of a state lie `row` floats apart; the state
// after step t is written at out + t * out_step.
template <class T>
struct Columns {
  int64_t dim, count, columns;  // keys; steps; columns: kWide * W or fewer
  const float* factors;         // of the first step
  const float* in;              // the state before the first step
  int64_t in_row;
  float* out;
  int64_t out_row, out_step;
  const T* v;
  int64_t v_step;
  T* y;  // or null
  int64_t y_step;
  float* s;  // or null
  int64_t s_step;
};

template <int N, bool kY, bool kNext>
VEC void step(int64_t dim, const float* f, const float* next_a, const float* in, int64_t in_row, float* out,
              int64_t out_row, const V* v, V* s, V* y) {
  const float *decay = f + kDecay * dim, *b = f + kB * dim, *k = f + kK * dim, *r = f + kR * dim;
  V sum[N], next[N];
  for (int i = 0; i < N; i++) sum[i] = next[i] = V{};
  for (int64_t j = 0; j < dim; j++) {
    const V dj = set(decay[j]), bj = set(b[j]), kj = set(k[j]);
    V x[N];
    UNROLL for (int i = 0; i < N; i++) {
      x[i] = fma(kj, v[i], fma(bj, s[i], load(in + j * in_row + i * W) * dj));
      store(out + j * out_row + i * W, x[i]);
    }
    if (kY) {
      const V rj = set(r[j]);
      UNROLL for (int i = 0; i < N; i++) sum[i] = fma(rj, x[i], sum[i]);
    }
    if (kNext) {
      const V aj = set(next_a[j]);
      UNROLL for (int i = 0; i < N; i++) next[i] = fma(aj, x[i], next[i]);
    }
  }
  for (int i = 0; i < N; i++) y[i] = sum[i];
  for (int i = 0; i < N; i++) s[i] = next[i];
}

template <int N, bool kY, class T>
void run_columns(const Columns<T>& c) {
  const auto lanes = [&](int i) { return std::min<int64_t>(W, c.columns - i * W); };
  V s[N], v[N], y[N];
  for (int i = 0; i < N; i++) s[i] = V{};
  for (int64_t j = 0; j < c.dim; j++) {
    const V aj = set(c.factors[kA * c.dim + j]);
    UNROLL for (int i = 0; i < N; i++) s[i] = fma(aj, load(c.in + j * c.in_row + i * W), s[i]);
  }
  const float* in = c.in;
  int64_t in_row = c.in_row;
  for (int64_t t = 0; t < c.count; t++) {
    const float* f = c.factors + t * kFactors * c.dim;
    float* out = c.out + t * c.out_step;
    for (int i = 0; i < N; i++) v[i] = get(c.v + t * c.v_step + i * W, lanes(i));
    if (c.s)
      for (int i = 0; i < N; i++) store(c.s + t * c.s_step + i * W, s[i]);
    if (t + 1 < c.count)
      step<N, kY, true>(c.dim, f, f + (kFactors + kA) * c.dim, in, in_row, out, c.out_row, v, s, y);
    else
      step<N, kY, false>(c.dim, f, nullptr, in, in_row, out, c.out_row, v, s, y);
    if (kY)
      for (int i = 0; i < N; i++) write(c.y + t * c.y_step + i * W, y[i], lanes(i));
    in = out;
    in_row = c.out_row;
  }
}

// Rows of a state, `columns` of each, to rows that may lie elsewhere.
[[maybe_unused]] void copy_state(const float* in, int64_t in_row, float* out, int64_t out_row, int64_t dim,
                                 int64_t columns) {
  for (int64_t j = 0; j < dim; j++)
    if (in)
      std::memcpy(out + j * out_row, in + j * in_row, columns * sizeof(float));
    else
      std::memset(out + j * out_row, 0, columns * sizeof(float));
}

}  // namespace
}  // namespace pyllm::ISA

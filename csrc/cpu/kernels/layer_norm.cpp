// Layer norm and rms norm, one kernel. A row is small enough to stay in the first-level cache, so its mean, its variance
// about that mean (two passes, no cancellation) and its output are three walks over it, and memory sees it once: with
// AVX2 that is as fast as the third-level cache gives and takes rows. Threads take rows. The weights are widened to float
// once a call. Gradients of the weights are summed by fixed blocks of rows, then over blocks in order, so that they do
// not depend on the number of threads.
//
// Both passes alone are faster than torch's (2048 x 256, 2 AVX2 cores: 1.1 to 1.5 times forward, 1.2 to 1.3 backward).
// Through autograd it is slower up to some 0.3 M elements: a Function written in Python costs 10 us more than torch's.
// bf16 is computed more slowly than memory gives it: the next rows are asked for meanwhile (512 x 896: 1.2 to 1.5 times).
#include "cpu/layer_norm.h"

#include <algorithm>
#include <type_traits>

#include "cpu/kernels/vec.h"

namespace pyllm::ISA {
namespace {

// The mean over i of each row's f(row, sum, i, lanes), in four interleaved partial sums: the order depends on `cols` alone.
template <int R, class F>
VEC void means(int64_t cols, float* out, const F& f) {
  V s[R][4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= cols; i += 4 * W)
    UNROLL for (int part = 0; part < 4; part++) UNROLL for (int r = 0; r < R; r++) s[r][part] =
        f(r, s[r][part], i + part * W, W);
  for (; i + W <= cols; i += W) UNROLL for (int r = 0; r < R; r++) s[r][0] = f(r, s[r][0], i, W);
  if (i < cols) UNROLL for (int r = 0; r < R; r++) s[r][1] = f(r, s[r][1], i, cols - i);
  UNROLL for (int r = 0; r < R; r++) out[r] = sum((s[r][0] + s[r][1]) + (s[r][2] + s[r][3])) / cols;
}

template <class F>
VEC void each(int64_t cols, const F& f) {
  int64_t i = 0;
  for (; i + W <= cols; i += W) f(i, W);
  if (i < cols) f(i, cols - i);
}

// Asks for the line at p + i, once a line, of rows of 16-bit types that come next. Those of float32 gain nothing by it, and
// lose room in the first-level cache.
template <int kWrite, class T>
VEC void fetch(const T* p, int64_t i) {
  if (sizeof(T) == 2 && i * sizeof(T) % 64 == 0) __builtin_prefetch(p + i, kWrite);
}

// Whether two rows stay in the first-level cache.
template <class T>
bool by_pairs(int64_t cols) {
  return cols * sizeof(T) <= 4096;
}

// As even shares of the rows as are worth a thread each.
template <class T>
int64_t grain_for(int64_t rows, int64_t cols) {
  const int64_t worth = 16384 / (cols + 1) + 1, pieces = std::max<int64_t>(1, (rows + worth - 1) / worth);
  const int64_t share = (rows + pieces - 1) / pieces;
  return by_pairs<T>(cols) ? (share + 1) / 2 * 2 : share;
}

// R rows from `row` on: two at a time where both stay in the first-level cache, so that one's sums need not wait for the
// other's, and the weights (backward: their gradients) cross the registers once for both.
template <bool kCentred, class T, int R>
void forward_rows(const NormArgs& a, const float* weight, const float* bias, int64_t row) {
  const int64_t cols = a.cols;
  const T *h[R], *next[R];
  T* y[R];
  for (int r = 0; r < R; r++) {
    h[r] = reinterpret_cast<const T*>(a.x) + a.x_rows.offset(row + r);
    next[r] = reinterpret_cast<const T*>(a.x) + a.x_rows.offset(std::min(row + R + r, a.x_rows.count - 1));
    y[r] = reinterpret_cast<T*>(a.y) + (row + r) * cols;
    if (!a.residual) continue;
    const T* other = reinterpret_cast<const T*>(a.residual) + a.residual_rows.offset(row + r);
    T* s = reinterpret_cast<T*>(a.sum) + (row + r) * cols;
    each(cols, [&](int64_t i, int64_t n) { write(s + i, get(h[r] + i, n) + get(other + i, n), n); });
    h[r] = s;
  }
  float mean[R] = {}, variance[R];
  if (kCentred)
    means<R>(cols, mean,
             [&](int r, V s, int64_t i, int64_t n) __attribute__((always_inline)) { return s + get(h[r] + i, n); });
  V m[R], scale[R];
  UNROLL for (int r = 0; r < R; r++) m[r] = set(mean[r]);
  means<R>(cols, variance, [&](int r, V s, int64_t i, int64_t n) __attribute__((always_inline)) {
    V d = get(h[r] + i, n) - m[r];
    if (n != W) d = keep(d, n, 0);
    return fma(d, d, s);
  });
  UNROLL for (int r = 0; r < R; r++) {
    const float rstd = 1.0f / __builtin_sqrtf(variance[r] + a.eps);
    scale[r] = set(rstd);
    if (a.rstd) a.rstd[row + r] = rstd;
    if (kCentred && a.mean) a.mean[row + r] = mean[r];
  }
  each(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const V w = weight ? get(weight + i, n) : V{}, b = bias ? get(bias + i, n) : V{};
    UNROLL for (int r = 0; r < R; r++) {
      V v = (get(h[r] + i, n) - m[r]) * scale[r];
      if (weight) v = v * w;
      if (bias) v = v + b;
      write(y[r] + i, v, n);
      fetch<0>(next[r], i);
      fetch<1>(y[r] + R * cols, i);
    }
  });
}

template <bool kCentred, class T, int R>
void backward_rows(const NormBackwardArgs& a, const float* weight, int64_t row, float* dweight, float* dbias) {
  const int64_t cols = a.cols;
  const T *dy[R], *h[R], *next_dy[R], *next_h[R];
  V m[R], scale[R];
  UNROLL for (int r = 0; r < R; r++) {
    dy[r] = reinterpret_cast<const T*>(a.dy) + a.dy_rows.offset(row + r);
    h[r] = reinterpret_cast<const T*>(a.h) + a.h_rows.offset(row + r);
    const int64_t next = std::min(row + R + r, a.h_rows.count - 1);
    next_dy[r] = reinterpret_cast<const T*>(a.dy) + a.dy_rows.offset(next);
    next_h[r] = reinterpret_cast<const T*>(a.h) + a.h_rows.offset(next);
    m[r] = set(kCentred ? a.mean[row + r] : 0.0f);
    scale[r] = set(a.rstd[row + r]);
  }
  // One walk for all the sums over these rows and for their share of the weights' gradients, one for the result.
  V along_sums[R][2] = {}, level_sums[R][2] = {};
  const auto add = [&](int part, int64_t i, int64_t n) __attribute__((always_inline)) {
    const V w = weight ? get(weight + i, n) : V{};
    V dw = dweight ? get(dweight + i, n) : V{}, db = dbias ? get(dbias + i, n) : V{};
    UNROLL for (int r = 0; r < R; r++) {
      const V g = get(dy[r] + i, n), x = (get(h[r] + i, n) - m[r]) * scale[r], weighted = weight ? g * w : g;
      along_sums[r][part] = fma(weighted, x, along_sums[r][part]);
      if (kCentred) level_sums[r][part] = level_sums[r][part] + weighted;
      dw = fma(g, x, dw);
      db = db + g;
    }
    if (dweight) write(dweight + i, dw, n);
    if (dbias) write(dbias + i, db, n);
  };
  int64_t i = 0;
  for (; i + 2 * W <= cols; i += 2 * W) UNROLL for (int part = 0; part < 2; part++) add(part, i + part * W, W);
  if (i + W <= cols) add(0, i, W), i += W;
  if (i < cols) add(1, i, cols - i);
  if (!a.dh) return;
  V along[R], level[R];
  const T* dsum[R];
  T* dh[R];
  UNROLL for (int r = 0; r < R; r++) {
    along[r] = set(sum(along_sums[r][0] + along_sums[r][1]) / cols);
    level[r] = set(kCentred ? sum(level_sums[r][0] + level_sums[r][1]) / cols : 0.0f);
    dsum[r] = reinterpret_cast<const T*>(a.dsum) + (a.dsum ? a.dsum_rows.offset(row + r) : 0);
    dh[r] = reinterpret_cast<T*>(a.dh) + (row + r) * cols;
  }
  each(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const V w = weight ? get(weight + i, n) : V{};
    UNROLL for (int r = 0; r < R; r++) {
      const V g = get(dy[r] + i, n), x = (get(h[r] + i, n) - m[r]) * scale[r], weighted = weight ? g * w : g;
      V d = (weighted - fma(x, along[r], level[r])) * scale[r];
      if (a.dsum) d = d + get(dsum[r] + i, n);
      write(dh[r] + i, d, n);
      fetch<0>(next_dy[r], i);
      fetch<0>(next_h[r], i);
      fetch<1>(dh[r] + R * cols, i);
    }
  });
}

// rows(row, R) over begin..end.
template <class T, class F>
VEC void by_twos(int64_t begin, int64_t end, int64_t cols, const F& rows) {
  int64_t row = begin;
  if (by_pairs<T>(cols))
    for (; row + 2 <= end; row += 2) rows(row, std::integral_constant<int, 2>());
  for (; row < end; row++) rows(row, std::integral_constant<int, 1>());
}

template <bool kCentred, class T>
void forward(const NormArgs& a) {
  auto* buffer = static_cast<float*>(cpu::scratch(2 * a.cols * sizeof(float) + 128, 0));
  const float* weight = a.weight ? as_floats(a.weight, a.weight_dtype, a.cols, buffer) : nullptr;
  const float* bias = a.bias ? as_floats(a.bias, a.weight_dtype, a.cols, buffer + a.cols) : nullptr;
  parallel_for(a.x_rows.count, grain_for<T>(a.x_rows.count, a.cols), [&](int64_t begin, int64_t end) {
    by_twos<T>(begin, end, a.cols,
               [&](int64_t row, auto count) { forward_rows<kCentred, T, count>(a, weight, bias, row); });
  });
}

template <bool kCentred, class T>
void backward(const NormBackwardArgs& a) {
  const int64_t rows = a.h_rows.count, per_block = rows < 64 * 16 ? 16 : (rows + 63) / 64;
  const int64_t blocks = (rows + per_block - 1) / per_block;
  const int64_t cols = a.cols, sums = (a.dweight ? blocks : 0) * cols;
  auto* buffer = static_cast<float*>(cpu::scratch((cols + 2 * blocks * cols + cols) * sizeof(float), 0));
  const float* weight = a.weight ? as_floats(a.weight, a.weight_dtype, cols, buffer) : nullptr;
  float* partial_weight = buffer + cols;
  float* partial_bias = partial_weight + sums;
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      float* dweight = a.dweight ? partial_weight + block * cols : nullptr;
      float* dbias = a.dbias ? partial_bias + block * cols : nullptr;
      if (dweight) std::memset(dweight, 0, cols * sizeof(float));
      if (dbias) std::memset(dbias, 0, cols * sizeof(float));
      const int64_t last = std::min((block + 1) * per_block, rows);
      by_twos<T>(block * per_block, last, cols,
                 [&](int64_t row, auto count) { backward_rows<kCentred, T, count>(a, weight, row, dweight, dbias); });
    }
  });
  const auto total = [&](const float* partial, char* out) {
    if (!out) return;
    with_dtype(a.weight_dtype, [&](auto* tag) {
      auto* result = reinterpret_cast<decltype(tag)>(out);
      each(cols, [&](int64_t i, int64_t n) {
        V s{};
        for (int64_t block = 0; block < blocks; block++) s = s + get(partial + block * cols + i, n);
        write(result + i, s, n);
      });
    });
  };
  total(partial_weight, a.dweight);
  total(partial_bias, a.dbias);
}

}  // namespace

void norm_forward(const NormArgs& a) {
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    a.centred ? forward<true, T>(a) : forward<false, T>(a);
  });
}

void norm_backward(const NormBackwardArgs& a) {
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    a.centred ? backward<true, T>(a) : backward<false, T>(a);
  });
}

}  // namespace pyllm::ISA

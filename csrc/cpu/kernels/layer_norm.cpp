// Layer norm and rms norm, one kernel. A row is small enough to stay in the first-level cache, so its mean, its variance
// about that mean (two passes, no cancellation) and its output are three walks over it, and memory sees it once. Threads
// take rows. The weights are widened to float once a call. Gradients of the weights are summed by fixed blocks of rows,
// then over blocks in order, so that they do not depend on the number of threads.
#include "cpu/layer_norm.h"

#include <type_traits>

#include "cpu/kernels/vec.h"

namespace pyllm::ISA {
namespace {

// sum over i of f(i, lanes), in four interleaved partial sums: the order depends on `cols` alone.
template <class F>
float reduce(int64_t cols, const F& f) {
  V s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * W <= cols; i += 4 * W) {
    s0 = f(s0, i, W);
    s1 = f(s1, i + W, W);
    s2 = f(s2, i + 2 * W, W);
    s3 = f(s3, i + 3 * W, W);
  }
  for (; i + W <= cols; i += W) s0 = f(s0, i, W);
  if (i < cols) s1 = f(s1, i, cols - i);
  return sum((s0 + s1) + (s2 + s3));
}

template <class F>
void each(int64_t cols, const F& f) {
  int64_t i = 0;
  for (; i + W <= cols; i += W) f(i, W);
  if (i < cols) f(i, cols - i);
}

int64_t grain_for(int64_t cols) { return cols >= 16384 ? 1 : 16384 / (cols + 1) + 1; }

template <bool kCentred, class T>
void forward_row(const NormArgs& a, const float* weight, const float* bias, int64_t row) {
  const int64_t cols = a.cols;
  const T* h = reinterpret_cast<const T*>(a.x) + row * a.x_stride;
  if (a.residual) {
    const T* r = reinterpret_cast<const T*>(a.residual) + row * a.residual_stride;
    T* s = reinterpret_cast<T*>(a.sum) + row * cols;
    each(cols, [&](int64_t i, int64_t n) { write(s + i, get(h + i, n) + get(r + i, n), n); });
    h = s;
  }
  float mean = 0;
  if (kCentred) mean = reduce(cols, [&](V s, int64_t i, int64_t n) { return s + get(h + i, n); }) / cols;
  const V m = set(mean);
  const float variance = reduce(cols,
                                [&](V s, int64_t i, int64_t n) {
                                  V d = get(h + i, n) - m;
                                  if (n != W) d = keep(d, n, 0);
                                  return fma(d, d, s);
                                }) /
                         cols;
  const float rstd = 1.0f / __builtin_sqrtf(variance + a.eps);
  if (a.rstd) a.rstd[row] = rstd;
  if (kCentred && a.mean) a.mean[row] = mean;
  const V r = set(rstd);
  T* y = reinterpret_cast<T*>(a.y) + row * cols;
  each(cols, [&](int64_t i, int64_t n) {
    V v = (get(h + i, n) - m) * r;
    if (weight) v = v * get(weight + i, n);
    if (bias) v = v + get(bias + i, n);
    write(y + i, v, n);
  });
}

template <bool kCentred, class T>
void backward_row(const NormBackwardArgs& a, const float* weight, int64_t row, float* dweight, float* dbias) {
  const int64_t cols = a.cols;
  const T* dy = reinterpret_cast<const T*>(a.dy) + row * a.dy_stride;
  const T* h = reinterpret_cast<const T*>(a.h) + row * a.h_stride;
  const V m = set(kCentred ? a.mean[row] : 0.0f), r = set(a.rstd[row]);
  const auto weighted = [&](int64_t i, int64_t n) {
    const V g = get(dy + i, n);
    return weight ? g * get(weight + i, n) : g;
  };
  // One walk for all the sums over this row and for this row's share of the weights' gradients, one for the result.
  V along_sums[4] = {}, level_sums[4] = {};
  const auto add = [&](int part, int64_t i, int64_t n) {
    const V g = get(dy + i, n), x = (get(h + i, n) - m) * r, w = weight ? g * get(weight + i, n) : g;
    along_sums[part] = fma(w, x, along_sums[part]);
    if (kCentred) level_sums[part] = level_sums[part] + w;
    if (dweight) write(dweight + i, fma(g, x, get(dweight + i, n)), n);
    if (dbias) write(dbias + i, g + get(dbias + i, n), n);
  };
  int64_t i = 0;
  for (; i + 4 * W <= cols; i += 4 * W) UNROLL for (int part = 0; part < 4; part++) add(part, i + part * W, W);
  for (; i + W <= cols; i += W) add(0, i, W);
  if (i < cols) add(1, i, cols - i);
  if (!a.dh) return;
  const auto mean_of = [&](const V* s) { return sum((s[0] + s[1]) + (s[2] + s[3])) / cols; };
  const float along = mean_of(along_sums), level = kCentred ? mean_of(level_sums) : 0.0f;
  const V c = set(along), l = set(level);
  const T* dsum = a.dsum ? reinterpret_cast<const T*>(a.dsum) + row * a.dsum_stride : nullptr;
  T* dh = reinterpret_cast<T*>(a.dh) + row * cols;
  each(cols, [&](int64_t i, int64_t n) {
    V g = (weighted(i, n) - fma((get(h + i, n) - m) * r, c, l)) * r;
    if (dsum) g = g + get(dsum + i, n);
    write(dh + i, g, n);
  });
}

template <bool kCentred, class T>
void forward(const NormArgs& a) {
  auto* buffer = static_cast<float*>(cpu::scratch(2 * a.cols * sizeof(float) + 128, 0));
  const float* weight = a.weight ? as_floats(a.weight, a.weight_dtype, a.cols, buffer) : nullptr;
  const float* bias = a.bias ? as_floats(a.bias, a.weight_dtype, a.cols, buffer + a.cols) : nullptr;
  parallel_for(a.rows, grain_for(a.cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) forward_row<kCentred, T>(a, weight, bias, row);
  });
}

template <bool kCentred, class T>
void backward(const NormBackwardArgs& a) {
  const int64_t per_block = a.rows < 64 * 16 ? 16 : (a.rows + 63) / 64, blocks = (a.rows + per_block - 1) / per_block;
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
      const int64_t last = (block + 1) * per_block < a.rows ? (block + 1) * per_block : a.rows;
      for (int64_t row = block * per_block; row < last; row++)
        backward_row<kCentred, T>(a, weight, row, dweight, dbias);
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

// One vector of floats, V, as wide as the instruction set has, and the functions that kernels build on. V is the
// compiler's own vector type: + - * / and comparisons work on it, and a comparison gives a mask for `select`.
//
// Everything here has internal linkage, and kernels keep theirs so: a function with external inline linkage compiled for
// AVX-512 could be the copy that the linker keeps for every other file, and crash older machines (tests/test_build.py
// reads the symbols). Results are the same for each lane whatever its neighbours, and the same for a partial vector as
// for a whole one: kernels treat tails with load_n and store_n and never with scalar code of another rounding.
//
// ISA_AVX512 says how wide V is, __AVX512F__ whether the instructions are there: they differ under PYLLM_EMULATE_AVX512.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/threads.h"
#include "dtype.h"

namespace pyllm::ISA {
namespace {

#define VEC [[maybe_unused]] inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

#if ISA_AVX512
constexpr int W = 16;
#elif ISA_AVX2
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
using V = float __attribute__((vector_size(W * 4)));
using VI = int32_t __attribute__((vector_size(W * 4)));

constexpr float kInfinity = __builtin_inff();

VEC V set(float x) { return x - V{}; }
VEC VI set_int(int32_t x) { return x - VI{}; }
VEC VI as_int(V x) { return reinterpret_cast<VI>(x); }
VEC V as_float(VI x) { return reinterpret_cast<V>(x); }
VEC V select(VI mask, V yes, V no) { return mask ? yes : no; }
VEC VI lane_index() {
  VI i;
  for (int k = 0; k < W; k++) i[k] = k;
  return i;
}
VEC uint32_t bits(VI mask) {  // lane k's truth in bit k
#if __AVX512F__
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif __AVX2__ && ISA_AVX2
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#elif __SSE2__ && !ISA_AVX512
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
#else
  uint32_t b = 0;
  for (int k = 0; k < W; k++) b |= (mask[k] & 1u) << k;
  return b;
#endif
}

VEC V fma(V a, V b, V c) {  // a * b + c, rounded once where the instruction set can
#if __AVX512F__
  return _mm512_fmadd_ps(a, b, c);
#elif __AVX2__ && ISA_AVX2
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__) || defined(__FMA__)
  for (int k = 0; k < W; k++) c[k] = __builtin_fmaf(a[k], b[k], c[k]);
  return c;
#else
  return a * b + c;
#endif
}
VEC V max(V a, V b) {  // a > b ? a : b, so b where either is NaN: the compiler would compare and blend
#if __AVX512F__
  return _mm512_max_ps(a, b);
#elif __AVX2__ && ISA_AVX2
  return _mm256_max_ps(a, b);
#elif __SSE2__ && !ISA_AVX512
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
VEC V min(V a, V b) {
#if __AVX512F__
  return _mm512_min_ps(a, b);
#elif __AVX2__ && ISA_AVX2
  return _mm256_min_ps(a, b);
#elif __SSE2__ && !ISA_AVX512
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
VEC V abs(V x) { return as_float(as_int(x) & 0x7fffffff); }
VEC V abs_below(V x, float limit) {  // min(|x|, limit), which NaN becomes as well
#if __AVX512DQ__
  return _mm512_range_ps(x, set(limit), 0b1010);  // the smaller magnitude, its sign cleared
#else
  return min(abs(x), set(limit));
#endif
}
VEC V copysign(V x, V sign) { return as_float((as_int(x) & 0x7fffffff) | (as_int(sign) & INT32_MIN)); }
VEC V sqrt(V x) {
#if __AVX512F__
  return _mm512_sqrt_ps(x);
#elif __AVX2__ && ISA_AVX2
  return _mm256_sqrt_ps(x);
#elif __SSE2__ && !ISA_AVX512
  return _mm_sqrt_ps(x);
#else
  for (int k = 0; k < W; k++) x[k] = __builtin_sqrtf(x[k]);
  return x;
#endif
}

// The lanes combined pairwise, always in this order.
VEC float sum(V x) {
  for (int half = W / 2; half > 0; half /= 2)
    for (int k = 0; k < half; k++) x[k] += x[k + half];
  return x[0];
}
VEC float max(V x) {
  for (int half = W / 2; half > 0; half /= 2)
    for (int k = 0; k < half; k++) x[k] = x[k] > x[k + half] ? x[k] : x[k + half];
  return x[0];
}

template <int kDistance>
VEC void swap_lanes(V* rows) {
  VI low, high;
  UNROLL for (int l = 0; l < W; l++) {
    low[l] = l & kDistance ? l - kDistance + W : l;
    high[l] = l & kDistance ? l + W : l + kDistance;
  }
  UNROLL for (int i = 0; i < W; i++) {
    if (i & kDistance) continue;
    const V a = rows[i], b = rows[i + kDistance];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + kDistance] = __builtin_shuffle(a, b, high);
  }
}

// W vectors as rows of a matrix, transposed in place: one 4 x 4 block in each 128-bit lane, then the lanes.
VEC void transpose(V* rows) {
  VI low, high, low2, high2;
  UNROLL for (int l = 0; l < W; l++) {
    const int lane = l / 4 * 4, odd = l & 1, pair = (l & 2) >> 1;
    low[l] = lane + pair + odd * W;
    high[l] = lane + 2 + pair + odd * W;
    low2[l] = lane + odd + pair * W;
    high2[l] = lane + 2 + odd + pair * W;
  }
  UNROLL for (int i = 0; i < W; i += 4) {
    const V a = __builtin_shuffle(rows[i], rows[i + 1], low), b = __builtin_shuffle(rows[i], rows[i + 1], high);
    const V c = __builtin_shuffle(rows[i + 2], rows[i + 3], low), d = __builtin_shuffle(rows[i + 2], rows[i + 3], high);
    rows[i] = __builtin_shuffle(a, c, low2);
    rows[i + 1] = __builtin_shuffle(a, c, high2);
    rows[i + 2] = __builtin_shuffle(b, d, low2);
    rows[i + 3] = __builtin_shuffle(b, d, high2);
  }
#if ISA_AVX2 || ISA_AVX512
  swap_lanes<4>(rows);
#endif
#if ISA_AVX512
  swap_lanes<8>(rows);
#endif
}

template <int kDistance>
VEC void add_halves(V* rows) {  // of 2 kDistance rows, as many become one
  VI low, high;
  UNROLL for (int l = 0; l < W; l++) {
    low[l] = l & kDistance ? l - kDistance + W : l;
    high[l] = l & kDistance ? l + W : l + kDistance;
  }
  UNROLL for (int i = 0; i < kDistance; i++) {
    const V a = rows[i], b = rows[i + kDistance];
    rows[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  }
}

// Lane i of the result is sum(rows[i]), with the same bits, for W rows, which are overwritten.
VEC V sums(V* rows) {
#if ISA_AVX512
  add_halves<8>(rows);
#endif
#if ISA_AVX2 || ISA_AVX512
  add_halves<4>(rows);
#endif
  add_halves<2>(rows);
  add_halves<1>(rows);
  return rows[0];
}

// Loads and stores of W elements of float, bf16 or f16 (16-bit types are widened; stores round to nearest, ties to even).
VEC V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
VEC void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }

using VH = uint16_t __attribute__((vector_size(W * 2)));
VEC V widen_bf16(VH h) {
#if __AVX512F__
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h)), 16));
#elif __AVX2__ && ISA_AVX2
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h)), 16));
#else
  return as_float(__builtin_convertvector(h, VI) << 16);
#endif
}
VEC VI round_bf16(V v) {  // the number's bits in the upper half of each lane; NaN stays NaN
#if __AVX512F__
  const __m512i bits = _mm512_castps_si512(v), up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i rounded = _mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
  constexpr int kQuietNan = 0x22;  // of v, in place of what was rounded, where v is NaN
  return reinterpret_cast<VI>(_mm512_fixupimm_ps(_mm512_castsi512_ps(rounded), v, _mm512_set1_epi32(kQuietNan), 0));
#else
  const VI bits = as_int(v), rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return v == v ? rounded : bits | 0x400000;
#endif
}
VEC VH narrow_bf16(V v) {
#if __AVX512F__
  return reinterpret_cast<VH>(_mm512_cvtepi32_epi16(_mm512_srli_epi32(reinterpret_cast<__m512i>(round_bf16(v)), 16)));
#else
  return __builtin_convertvector(round_bf16(v) >> 16, VH);
#endif
}
VEC V widen_f16(VH h) {
#if __AVX512F__
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(h));
#elif __AVX2__ && ISA_AVX2
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(h));
#else
  // Half's exponent and mantissa moved into float's place, then rescaled by 2^112; infinity and NaN have their own.
  const VI wide = __builtin_convertvector(h, VI);
  const VI magnitude = (wide & 0x7fff) << 13;
  const V scaled = as_float(magnitude) * 0x1p112f;
  const VI special = magnitude >= (0x7c00 << 13);
  return as_float((special & (magnitude | 0x7f800000)) | (~special & as_int(scaled)) | ((wide & 0x8000) << 16));
#endif
}
VEC VH narrow_f16(V v) {
#if __AVX512F__
  return reinterpret_cast<VH>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif __AVX2__ && ISA_AVX2
  return reinterpret_cast<VH>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  const VI sign = (as_int(v) >> 16) & 0x8000;
  V x = abs(v);
  x = x > 131072.0f ? set(131072.0f) : x;
  // Adding a power of two 2^13 above x's own leaves 11 bits of it, rounded to even; below 2^-14 the step is fixed.
  const VI exponent = as_int(max(x, set(0x1p-14f))) & 0x7f800000;
  const V magic = as_float(exponent + (13 << 23));
  const V kept = (x + magic) - magic;
  const VI normal = (as_int(kept * 0x1p-112f) >> 13);
  VI half = kept < set(0x1p-14f) ? (as_int(kept * 0x1p24f + 0x1p23f) & 0x3ff) : normal;
  half = kept >= set(65536.0f) ? set_int(0x7c00) : half;
  half = x != x ? set_int(0x7e00) : half;
  return __builtin_convertvector(half | sign, VH);
#endif
}

VEC VH load_bits(const void* p) {
  VH h;
  std::memcpy(&h, p, sizeof h);
  return h;
}
VEC V load(const bf16* p) { return widen_bf16(load_bits(p)); }
VEC V load(const f16* p) { return widen_f16(load_bits(p)); }
VEC V load(const int8_t* p) {
  using VN = int8_t __attribute__((vector_size(W)));
  VN bytes;
  std::memcpy(&bytes, p, sizeof bytes);
#if __AVX512F__
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(reinterpret_cast<__m128i>(bytes)));
#elif __AVX2__ && ISA_AVX2
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(reinterpret_cast<int64_t>(bytes))));
#else
  return __builtin_convertvector(__builtin_convertvector(bytes, VI), V);
#endif
}
VEC void store(bf16* p, V v) {
  const VH h = narrow_bf16(v);
  std::memcpy(static_cast<void*>(p), &h, sizeof h);
}
VEC void store(f16* p, V v) {
  const VH h = narrow_f16(v);
  std::memcpy(static_cast<void*>(p), &h, sizeof h);
}

// 2 W elements as two vectors, for work that does not care which lane an element is in: those of bf16, whose order takes
// time to keep, are the even and the odd ones.
template <class T>
VEC void load_pair(const T* p, V& a, V& b) {
  a = load(p), b = load(p + W);
}
VEC void load_pair(const bf16* p, V& a, V& b) {
  VI both;
  std::memcpy(&both, p, sizeof both);
  a = as_float(both << 16), b = as_float(both & static_cast<int32_t>(0xffff0000));
}
template <class T>
VEC void store_pair(T* p, V a, V b) {
  store(p, a), store(p + W, b);
}
VEC void store_pair(bf16* p, V a, V b) {
  const VI even = round_bf16(a), odd = round_bf16(b);
#if __AVX512F__
  const __m512i lower = _mm512_srli_epi32(reinterpret_cast<__m512i>(even), 16);
  const VI both = reinterpret_cast<VI>(_mm512_mask_blend_epi16(0xaaaaaaaa, lower, reinterpret_cast<__m512i>(odd)));
#else
  const VI both = ((even >> 16) & 0xffff) | (odd & static_cast<int32_t>(0xffff0000));
#endif
  std::memcpy(static_cast<void*>(p), &both, sizeof both);
}

// A W x W block whose columns begin at p and lie along memory, `column_step` apart: rows[l] is its row l. AVX-512 loads
// quarters of columns into the lanes where they belong: half of a transposition is left to the port that shuffles.
VEC void load_transposed(const float* p, int64_t column_step, V* rows) {
#if __AVX512F__
  UNROLL for (int k = 0; k < W; k += 4) {
    __m512 x[4];
    UNROLL for (int i = 0; i < 4; i++) {
      const float* quarter = p + i * column_step + k;
      x[i] = _mm512_castps128_ps512(_mm_loadu_ps(quarter));
      x[i] = _mm512_mask_broadcast_f32x4(x[i], 0x00f0, _mm_loadu_ps(quarter + 4 * column_step));
      x[i] = _mm512_mask_broadcast_f32x4(x[i], 0x0f00, _mm_loadu_ps(quarter + 8 * column_step));
      x[i] = _mm512_mask_broadcast_f32x4(x[i], 0xf000, _mm_loadu_ps(quarter + 12 * column_step));
    }
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
    rows[k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    rows[k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    rows[k + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    rows[k + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#else
  UNROLL for (int l = 0; l < W; l++) rows[l] = load(p + l * column_step);
  transpose(rows);
#endif
}

// The first n < W elements; the lanes beyond are `fill` and are not written.
VEC V keep(V v, int64_t n, float fill) { return lane_index() < static_cast<int32_t>(n) ? v : set(fill); }
VEC V load_n(const float* p, int64_t n, float fill = 0) {
#if __AVX512F__
  return _mm512_mask_loadu_ps(set(fill), static_cast<__mmask16>((1u << n) - 1), p);
#else
  float block[W];
  for (int k = 0; k < W; k++) block[k] = fill;
  std::memcpy(block, p, n * sizeof(float));
  return load(block);
#endif
}
template <class T>
VEC V load_n(const T* p, int64_t n, float fill = 0) {
  T block[W] = {};
  std::memcpy(static_cast<void*>(block), p, n * sizeof(T));
  const V v = load(block);
  return fill == 0 ? v : keep(v, n, fill);
}
VEC void store_n(float* p, V v, int64_t n) {
#if __AVX512F__
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
#else
  std::memcpy(p, &v, n * sizeof(float));
#endif
}
template <class T>
VEC void store_n(T* p, V v, int64_t n) {
  T block[W];
  store(block, v);
  std::memcpy(static_cast<void*>(p), block, n * sizeof(T));
}

// 1 to W elements.
template <class T>
VEC V get(const T* p, int64_t n) {
  return n == W ? load(p) : load_n(p, n);
}
template <class T>
VEC void write(T* p, V v, int64_t n) {
  n == W ? store(p, v) : store_n(p, v, n);
}

// One element, with the same rounding.
VEC float to_float(float x) { return x; }
VEC float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
VEC float to_float(f16 x) { return load_n(&x, 1)[0]; }
VEC void put(float* p, float x) { *p = x; }
template <class T>
VEC void put(T* p, float x) {
  store_n(p, set(x), 1);
}

// What is stored in bf16 needs less: `rough` functions are off by up to 1e-4 of themselves, a thirtieth of that rounding.
enum class Digits { all, rough };

// 1 / d for d in [1, 2^126), within 1 unit in the last place: a division takes as long as 16 other instructions.
template <Digits kDigits = Digits::all>
VEC V reciprocal(V d) {
#if __AVX512F__
  const V y = _mm512_rcp14_ps(d);
  return kDigits == Digits::rough ? y : fma(y, fma(-d, y, set(1.0f)), y);
#else
  return 1.0f / d;
#endif
}

constexpr float kShift = 12582912.0f;  // added to it, a number's nearest integer sits in the low bits

// x less k times log(2), the nearest such multiple, for x in [-104, 89]; `shifted` = k + kShift.
VEC V less_powers(V x, V& shifted) {
  shifted = fma(x, set(1.44269504088896341f), set(kShift));
  const V k = shifted - kShift;
  return fma(k, set(-1.42860682030941723212e-6f), fma(k, set(-0.693145751953125f), x));
}
// exp(r / kScale), where |r / kScale| is at most about log(2) / 2.
template <int kScale = 1>
VEC V exp_near_zero(V r) {
  constexpr float s = 1.0f / kScale;
  V p = set(1.38145839e-3f * (s * s * s * s * s * s));
  p = fma(p, r, set(8.36872403e-3f * (s * s * s * s * s)));
  p = fma(p, r, set(4.16683887e-2f * (s * s * s * s)));
  p = fma(p, r, set(1.66665205e-1f * (s * s * s)));
  p = fma(p, r, set(4.99999934e-1f * (s * s)));
  p = fma(p, r, set(s));
  return fma(p, r, set(1.0f));
}
template <int kScale = 1>
VEC V rough_exp_near_zero(V r) {
  constexpr float s = 1.0f / kScale;
  V p = set(4.15137826e-2f * (s * s * s * s));
  p = fma(p, r, set(1.67875211e-1f * (s * s * s)));
  p = fma(p, r, set(5.00030161e-1f * (s * s)));
  p = fma(p, r, set(9.99966811e-1f * s));
  return fma(p, r, set(1.0f));
}
// p 2^k, which may overflow or be denormal, for |k| <= 252.
VEC V times_power(V p, V shifted) {
#if __AVX512F__
  return _mm512_scalef_ps(p, shifted - kShift);
#else
  const VI k = as_int(shifted) - as_int(set(kShift)), half = k >> 1;  // two steps, each with a factor that is normal
  return p * as_float((half + 127) << 23) * as_float((k - half + 127) << 23);
#endif
}
// The same where 2^k is a normal number.
VEC V times_normal_power(V p, V shifted) {
#if __AVX512F__
  return times_power(p, shifted);
#else
  return p * as_float((as_int(shifted) << 23) + as_int(set(1.0f)));
#endif
}

// exp: error below 1 unit in the last place; overflow to infinity, underflow to denormals and 0, NaN stays NaN.
VEC V exp(V x) {
  V shifted;
  const V p = exp_near_zero(less_powers(max(set(-104.0f), min(set(89.0f), x)), shifted));
  return times_power(p, shifted);
}

// The same where x <= 0, as in a softmax: cheaper, and 0 below exp(-87), so that no denormal slows what follows.
template <Digits kDigits = Digits::all>
VEC V exp_nonpositive(V x) {
  V shifted, p;
  if constexpr (kDigits == Digits::rough) {
    shifted = fma(x, set(1.44269504088896341f), set(kShift));
    p = rough_exp_near_zero(fma(shifted - kShift, set(-0.693147180559945309f), x));
  } else {
    p = exp_near_zero(less_powers(x, shifted));
  }
  return x < -87.0f ? V{} : times_normal_power(p, shifted);
}

// log: error below 1 unit in the last place; log(0) = -infinity, negative numbers and NaN give NaN.
VEC V log(V x) {
  const VI tiny = x < 0x1p-126f;
  const V scaled = select(tiny, x * 0x1p23f, x);
  const VI bits = as_int(scaled);
  VI e = (bits >> 23) - 126 - (tiny & 23);
  V m = as_float((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
  const VI low = m < 0.707106781186547524f;
  e = e + low;  // a true lane is -1
  m = select(low, m + m, m) - 1.0f;
  const V z = m * m, f = __builtin_convertvector(e, V);
  V p = set(7.0376836292e-2f);
  p = fma(p, m, set(-1.1514610310e-1f));
  p = fma(p, m, set(1.1676998740e-1f));
  p = fma(p, m, set(-1.2420140846e-1f));
  p = fma(p, m, set(1.4249322787e-1f));
  p = fma(p, m, set(-1.6668057665e-1f));
  p = fma(p, m, set(2.0000714765e-1f));
  p = fma(p, m, set(-2.4999993993e-1f));
  p = fma(p, m, set(3.3333331174e-1f));
  V y = p * m * z;
  y = fma(f, set(-2.12194440e-4f), y);
  y = fma(z, set(-0.5f), y);
  y = m + y;
  y = fma(f, set(0.693359375f), y);
  y = select(x == kInfinity, x, y);
  y = select(x == 0.0f, set(-kInfinity), y);
  return (x < 0.0f) | (x != x) ? set(__builtin_nanf("")) : y;
}

// 1 / (1 + exp(-x)), and in `rest` what is left of 1, where it is asked for: both keep their digits. What is raised and
// divided is on the safe side, exp(-|x|) and 1 to 2.
template <Digits kDigits = Digits::all>
VEC V sigmoid(V x, V* rest = nullptr) {
  const V e = exp_nonpositive<kDigits>(-abs(x)), large = reciprocal<kDigits>(e + 1.0f), small = e * large;
  if (rest) *rest = x > 0.0f ? small : large;
  return x > 0.0f ? large : small;
}

// Of u = -2 |x|: tanh(|x|) = -expm1(u) / (2 + expm1(u)), where expm1 = 2^k (exp(r) - 1) + (2^k - 1) keeps its digits near 0
// since there k = 0. The polynomial is of r / 2. And its slope, 4 exp(u) / (1 + exp(u))^2, where it is asked for.
template <Digits kDigits = Digits::all>
VEC V tanh(V x, V* slope = nullptr) {
  constexpr float kMost = 43.5f;  // beyond, u has no power that is a normal number: 1, and 0
  V r = max(set(-kMost), -abs(x)), p;
  const V shifted = fma(r, set(2.88539008177792681f), set(kShift)), k = shifted - kShift;
  if constexpr (kDigits == Digits::rough) {
    r = fma(k, set(-0.346573590279972655f), r);
    p = set(4.16665855e-2f * 16);
    p = fma(p, r, set(1.67667535e-1f * 8));
    p = fma(p, r, set(5.00012529e-1f * 4));
    p = fma(p, r, set(9.99985096e-1f * 2));
  } else {
    r = fma(k, set(-0.71430341015470861606e-6f), fma(k, set(-0.3465728759765625f), r));
    p = set(1.38888726e-3f * 64);
    p = fma(p, r, set(8.36908292e-3f * 32));
    p = fma(p, r, set(4.16671366e-2f * 16));
    p = fma(p, r, set(1.66665061e-1f * 8));
    p = fma(p, r, set(4.99999981e-1f * 4));
    p = fma(p, r, set(2.0f));
  }
  const V power = times_normal_power(set(1.0f), shifted), e = fma(power, p * r, power - 1.0f);
  const V share = reciprocal<kDigits>(e + 2.0f);
  if (slope) *slope = abs(x) >= kMost ? V{} : 4.0f * fma(power, p * r, power) * share * share;
  return copysign(e * share, x);
}

// Sine and cosine of angles in double, error below 2 units in the last place of float: the angle is taken modulo pi / 2 in
// three steps, each exact while there are fewer than 2^20 quarter turns, and is off by about 2^-53 of itself beyond.
using VD = double __attribute__((vector_size(W * 8)));
VEC void sincos(VD angle, V& sine, V& cosine) {
  using VL = int64_t __attribute__((vector_size(W * 8)));
  constexpr double kMagic = 0x1.8p52;
  const VD shifted = angle * 0.63661977236758134308 + kMagic, k = shifted - kMagic;
  const VI quarter = __builtin_convertvector(reinterpret_cast<VL>(shifted) & 3, VI);
  const VD turned =
      ((angle - k * 1.57079632673412561417) - k * 6.07710050630396597660e-11) - k * 2.02226624879595063154e-21;
  const V r = __builtin_convertvector(turned, V), z = r * r;
  V s = fma(set(-1.9515295891e-4f), z, set(8.3321608736e-3f));
  s = fma(s, z, set(-1.6666654611e-1f));
  s = fma(s * z, r, r);
  V c = fma(set(2.443315711809948e-5f), z, set(-1.388731625493765e-3f));
  c = fma(c, z, set(4.166664568298827e-2f));
  c = fma(c * z, z, fma(z, set(-0.5f), set(1.0f)));
  const VI swapped = (quarter & 1) != 0;
  sine = as_float(as_int(select(swapped, c, s)) ^ ((quarter & 2) << 30));
  cosine = as_float(as_int(select(swapped, s, c)) ^ (((quarter + 1) & 2) << 30));
}

// The standard normal distribution's mass beyond a, 0 <= a <= 14.5, and bell = exp(-a^2 / 2). The tail is the bell times a
// polynomial in 1 / (1 + c a), fitted for the least largest relative error: it keeps its digits until it is 0.
template <Digits kDigits = Digits::all>
VEC V normal_tail(V a, V& bell) {
  // a^2 less a multiple of log(4), without rounding a^2, which would cost the bell digits.
  const V shifted = fma(a * -0.72134752044448170f, a, set(kShift)), k = shifted - kShift;
  if constexpr (kDigits == Digits::rough) {
    bell = times_power(rough_exp_near_zero<-2>(fma(a, a, k * 1.38629436111989062f)), shifted);
    const V t = reciprocal<kDigits>(fma(a, set(0.3775f), set(1.0f)));
    V p = set(-0.09066522121429443f);
    p = fma(p, t, set(0.1953372359275818f));
    p = fma(p, t, set(0.0872533842921257f));
    p = fma(p, t, set(0.1579306274652481f));
    p = fma(p, t, set(0.15012887120246887f));
    return p * (t * bell);
  } else {
    const V r = fma(k, set(2.85721364061883446e-6f), fma(a, a, k * 1.38629150390625f));
    bell = times_power(exp_near_zero<-2>(r), shifted);
    const V t = reciprocal(fma(a, set(0.305f), set(1.0f))), z = t * t;
    V even = set(-0.1529877632856369f), odd = set(0.03669905290007591f);  // powers: two chains of half the length
    even = fma(even, z, set(-0.037976015359163284f));
    odd = fma(odd, z, set(0.18571598827838898f));
    even = fma(even, z, set(0.10342098772525787f));
    odd = fma(odd, z, set(0.12102126330137253f));
    even = fma(even, z, set(0.12163973599672318f));
    odd = fma(odd, z, set(0.1224667951464653f));
    return fma(odd, t, even) * (t * bell);
  }
}

// body(begin, end) over [0, n) on the team of threads; pieces come in any order and number.
template <class Body>
[[maybe_unused]] void parallel_for(int64_t n, int64_t grain, const Body& body) {
  cpu::run_parallel(
      n, grain, [](const void* f, int64_t begin, int64_t end) { (*static_cast<const Body*>(f))(begin, end); }, &body);
}

// Calls f with a null pointer of the storage type: with_dtype(t, [&](auto* tag) { run(static_cast<decltype(tag)>(p)); }).
template <class F>
[[maybe_unused]] void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::bf16:
      return f(static_cast<bf16*>(nullptr));
    case DType::f16:
      return f(static_cast<f16*>(nullptr));
    default:
      __builtin_trap();  // ops/ has checked
  }
}

// `count` elements as float: the pointer itself where it is float already, else a converted copy in `buffer`.
[[maybe_unused]] const float* as_floats(const void* p, DType dtype, int64_t count, float* buffer) {
  if (dtype == DType::f32) return static_cast<const float*>(p);
  with_dtype(dtype, [&](auto* tag) {
    const auto* source = static_cast<decltype(tag)>(const_cast<void*>(p));
    int64_t i = 0;
    for (; i + W <= count; i += W) store(buffer + i, load(source + i));
    if (i < count) store_n(buffer + i, load_n(source + i, count - i), count - i);
  });
  return buffer;
}

}  // namespace
}  // namespace pyllm::ISA

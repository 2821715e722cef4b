// One vector of floats, V, as wide as the instruction set has, and what kernels build on. V is the
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

[[maybe_unused]] int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

VEC V set(float x) { return x - V{}; }
VEC VI set_int(int32_t x) { return x - VI{}; }
VEC VI as_int(V x) { return reinterpret_cast<VI>(x); }
VEC V as_float(VI x) { return reinterpret_cast<V>(x); }
VEC VI wrapping_add(VI a, VI b) {  // modulo 2^32: for numbers' bits, where lanes that are not used may overflow
  using VU = uint32_t __attribute__((vector_size(W * 4)));
  return reinterpret_cast<VI>(reinterpret_cast<VU>(a) + reinterpret_cast<VU>(b));
}
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

template <int kBy>
VEC V lanes_from(V x) {  // lane k becomes that of k + kBy, in a circle
  VI from;
  UNROLL for (int k = 0; k < W; k++) from[k] = (k + kBy) % W;
  return __builtin_shuffle(x, from);
}
// The lanes combined pairwise, always in this order: those of the upper half to those of the lower one.
template <class F>
VEC float fold(V x, const F& combine) {
  if constexpr (W > 8) x = combine(x, lanes_from<8>(x));
  if constexpr (W > 4) x = combine(x, lanes_from<4>(x));
  x = combine(x, lanes_from<2>(x));
  return combine(x, lanes_from<1>(x))[0];
}
VEC float sum(V x) {
  return fold(x, [](V a, V b) { return a + b; });
}
VEC float max(V x) {
  return fold(x, [](V a, V b) { return max(a, b); });
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
  const VI bits = as_int(v), rounded = wrapping_add(bits, ((bits >> 16) & 1) + 0x7fff);
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

// A W x W block of words whose columns begin at p and lie along memory, `column_bytes` apart: rows[l] is its row l. AVX-512
// loads halves of columns into the lanes where they belong, which spares the port that shuffles a quarter of its work, both
// halves of a line at once: columns a power of two apart fall into few sets of the first-level cache, and by quarters, one
// after another, their lines were gone again before the last was read.
VEC void load_transposed(const void* p, int64_t column_bytes, V* rows) {
  const auto* corner = static_cast<const char*>(p);
#if __AVX512F__
  __m512 halves[2][8];
  UNROLL for (int i = 0; i < 8; i++) {
    const char *first = corner + (i < 4 ? i : i + 4) * column_bytes, *second = first + 4 * column_bytes;
    UNROLL for (int h = 0; h < 2; h++) {
      const __m512d half = _mm512_castpd256_pd512(_mm256_loadu_pd(reinterpret_cast<const double*>(first + 32 * h)));
      const __m256d other = _mm256_loadu_pd(reinterpret_cast<const double*>(second + 32 * h));
      halves[h][i] = _mm512_castpd_ps(_mm512_insertf64x4(half, other, 1));
    }
  }
  UNROLL for (int h = 0; h < 2; h++) {
    __m512 quarters[8];  // rows k and k + 4 of columns 0 to 7, then of 8 to 15
    UNROLL for (int i = 0; i < 8; i += 4) {
      const __m512* x = halves[h] + i;
      const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1]));
      const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1]));
      const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3]));
      const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
      quarters[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
      quarters[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
      quarters[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
      quarters[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    UNROLL for (int k = 0; k < 4; k++) {
      rows[8 * h + k] = _mm512_shuffle_f32x4(quarters[k], quarters[4 + k], 0x88);
      rows[8 * h + 4 + k] = _mm512_shuffle_f32x4(quarters[k], quarters[4 + k], 0xdd);
    }
  }
#else
  UNROLL for (int l = 0; l < W; l++) std::memcpy(rows + l, corner + l * column_bytes, sizeof(V));
  transpose(rows);
#endif
}
VEC void load_transposed(const float* p, int64_t column_step, V* rows) {
  load_transposed(static_cast<const void*>(p), column_step * static_cast<int64_t>(sizeof(float)), rows);
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

// Whole numbers of 8 and 16 bits in vectors of W 32-bit lanes, exact: what quantised products are made of.
#pragma once
#include "cpu/kernels/vec.h"

namespace pyllm::ISA {
namespace {

using VS = int16_t __attribute__((vector_size(W * 4)));
using VB = int8_t __attribute__((vector_size(W * 4)));

VEC VI load_lanes(const void* p) {
  VI v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
VEC VI broadcast_lane(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return set_int(x);
}

#if ISA_AVX512 && !__AVX512F__  // both halves with the narrower instructions
template <class F>
VEC VI by_halves(VI a, VI b, const F& f) {
  __m256i x[2], y[2];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  UNROLL for (int i = 0; i < 2; i++) x[i] = f(x[i], y[i]);
  std::memcpy(&a, x, sizeof a);
  return a;
}
#endif

// In each lane, a0 * b0 + a1 * b1 of its signed 16-bit halves.
VEC VI dot_halves(VI a, VI b) {
#if __AVX512F__
  return reinterpret_cast<VI>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif ISA_AVX512 && defined(__x86_64__)
  return by_halves(a, b, [](__m256i x, __m256i y) { return _mm256_madd_epi16(x, y); });
#elif ISA_AVX2
  return reinterpret_cast<VI>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif __SSE2__
  return reinterpret_cast<VI>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// In each 16-bit half, u0 * s0 + u1 * s1 of its bytes, u unsigned and s signed. The caller keeps it below 2^15.
VEC VI dot_pairs(VI u, VI s) {
#if __AVX512F__
  return reinterpret_cast<VI>(_mm512_maddubs_epi16(reinterpret_cast<__m512i>(u), reinterpret_cast<__m512i>(s)));
#elif ISA_AVX512 && defined(__x86_64__)
  return by_halves(u, s, [](__m256i x, __m256i y) { return _mm256_maddubs_epi16(x, y); });
#elif ISA_AVX2
  return reinterpret_cast<VI>(_mm256_maddubs_epi16(reinterpret_cast<__m256i>(u), reinterpret_cast<__m256i>(s)));
#else
  const VS even = reinterpret_cast<VS>(u & 0x00ff00ff), odd = reinterpret_cast<VS>((u >> 8) & 0x00ff00ff);
  const VS signs = reinterpret_cast<VS>(s);
  return reinterpret_cast<VI>(even * ((signs << 8) >> 8) + odd * (signs >> 8));
#endif
}
VEC VI add_halves(VI a, VI b) { return reinterpret_cast<VI>(reinterpret_cast<VS>(a) + reinterpret_cast<VS>(b)); }

// In each lane, sum + the four products of its bytes, u unsigned and s signed: one instruction, that the processor must
// have (cpu::has_vnni). It is written as assembly, since the file is not compiled for it.
VEC VI dot_bytes(VI sum, VI u, VI s) {
#if __AVX512F__
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
  return sum;
#elif ISA_AVX2
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(u), "x"(s));
  return sum;
#else
  const VS signs = reinterpret_cast<VS>(s);
  return sum + dot_halves(u & 0x00ff00ff, reinterpret_cast<VI>((signs << 8) >> 8)) +
         dot_halves((u >> 8) & 0x00ff00ff, reinterpret_cast<VI>(signs >> 8));
#endif
}

// W floats to the nearest whole numbers (ties to even), of those below 2^22 in size.
VEC VI nearest(V v) {
  const V magic = set(12582912.0f);
  return as_int(v + magic) - as_int(magic);
}

// W whole numbers, in -128..127, as bytes.
VEC void store_bytes(int8_t* p, VI whole) {
  using VN = int8_t __attribute__((vector_size(W)));
  const VN bytes = __builtin_convertvector(whole, VN);
  std::memcpy(p, &bytes, sizeof bytes);
}

}  // namespace
}  // namespace pyllm::ISA

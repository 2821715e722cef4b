// Exponentials and what is made of them, for one vector of floats.
#pragma once
#include "cpu/kernels/vec.h"

namespace pyllm::ISA {
namespace {

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
  return p * as_float(wrapping_add(as_int(shifted) << 23, as_int(set(1.0f))));
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

// exp(x) = p power for x in [-87, 0]: a product that the caller may have in a sum. The nearest W-th part of a power of two
// comes from a table in a register, so that p is a short polynomial: fewer instructions than exp_nonpositive, whose chain
// of them is longer than what a core looks ahead.
template <Digits kDigits = Digits::all>
VEC void exp_in_parts(V x, V& p, V& power) {
#if ISA_AVX512 || ISA_AVX2
  constexpr float kStep = 0.693147180559945309f / W, kMost = kStep / 2;  // of what is left
  constexpr int kBits = W == 16 ? 4 : 3;
  V powers;
  UNROLL for (int i = 0; i < W; i++) powers[i] = static_cast<float>(__builtin_exp2(static_cast<double>(i) / W));
  VI table = as_int(powers);
  UNROLL for (int i = 0; i < W; i++) table[i] -= i << (23 - kBits);
  const V shifted = fma(x, set(1 / kStep), set(kShift)), r = fma(shifted - kShift, set(-kStep), x);
  power = as_float(wrapping_add(__builtin_shuffle(table, as_int(shifted)), as_int(shifted) << (23 - kBits)));
  if constexpr (kDigits == Digits::rough) {
    p = fma(r, set(0.5f), set(1 + kMost * kMost / 8));
  } else {
    p = fma(r, set(1.66666667e-1f), set(0.5f + kMost * kMost * 0.0345f));
    p = fma(p, r, set(1.0f));
  }
  p = fma(p, r, set(1.0f));
#else
  V shifted;
  p = exp_near_zero(less_powers(x, shifted));
  power = as_float(wrapping_add(as_int(shifted) << 23, as_int(set(1.0f))));
#endif
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

}  // namespace
}  // namespace pyllm::ISA

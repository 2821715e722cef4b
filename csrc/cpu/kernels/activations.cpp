// Activations, plain and gated. Every element stands alone, so a call is one walk over memory, in pieces of a row that
// threads take; its floor is the memory it reads and writes or, with AVX-512, the 25 to 35 instructions that a vector
// takes on two ports, which no division may hold up (`reciprocal`). Backward recomputes f and its slope from the input and
// writes both gradients of a gated form in the same walk.
//
// gelu(x) = x times the normal distribution's mass below x, which is computed from its tail: exact to a few units in the
// last place also where x is very negative and 1 + erf(x) would cancel. Likewise its tanh form is x sigmoid(2 u). What is
// stored in bf16 is computed to 1e-4 of itself.
#include "cpu/activations.h"

#include <algorithm>
#include <type_traits>

#include "cpu/kernels/each.h"
#include "cpu/kernels/functions.h"

namespace pyllm::ISA {
namespace {

constexpr int64_t kPiece = 4096;
constexpr int64_t kFew = 12288;  // elements that are computed before another thread is awake

VEC V within(V x, float limit) {  // NaN stays NaN
  return max(set(-limit), min(set(limit), x));
}

// f(x), and its slope where it is asked for.
template <Activation kKind, Digits kDigits>
VEC V activate(V x, V* slope) {
  if constexpr (kKind == Activation::gelu) {
    V bell;
    const V a = abs_below(x, 14.5f), tail = normal_tail<kDigits>(a, bell);  // beyond, the tail is 0
    if (slope) *slope = fma(x * 0.39894228040143268f, bell, x < 0.0f ? tail : 1.0f - tail);
    return fma(-a, tail, max(V{}, x));
  } else if constexpr (kKind == Activation::gelu_tanh) {
    constexpr float kTwice = 1.5957691216057308f, kCube = 0.044715f;  // 2 sqrt(2 / pi)
    const V c = within(x, 13.0f), z = c * c;                          // beyond, the sigmoid is 0 or 1
    V rest;
    const V s = sigmoid<kDigits>(c * kTwice * fma(z, set(kCube), set(1.0f)), &rest);
    if (slope) *slope = fma(c * s * rest, kTwice * fma(z, set(3 * kCube), set(1.0f)), s);
    return x * s;
  } else if constexpr (kKind == Activation::silu) {
    V rest;
    const V s = sigmoid<kDigits>(x, &rest);
    if (slope) *slope = s * fma(x, rest, set(1.0f));
    return x * s;
  } else if constexpr (kKind == Activation::sigmoid) {
    V rest;
    const V s = sigmoid<kDigits>(x, &rest);
    if (slope) *slope = s * rest;
    return s;
  } else if constexpr (kKind == Activation::tanh) {
    return tanh<kDigits>(x, slope);
  } else {
    const V y = max(V{}, x);  // NaN stays NaN
    if (slope) *slope = y + y;
    return y * y;
  }
}

// body(row, first column, last column) over all pieces.
template <class F>
void each_piece(int64_t rows, int64_t cols, const F& body) {
  const int64_t across = (cols + kPiece - 1) / kPiece;
  const int64_t worth = rows * cols <= kFew ? rows * across : 2 * kPiece / (std::min(cols, kPiece) + 16);
  const int64_t grain = std::max<int64_t>(1, worth);
  parallel_for(rows * across, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = i % across * kPiece;
      body(i / across, first, std::min(first + kPiece, cols));
    }
  });
}

template <class T>
constexpr Digits kDigitsOf = std::is_same_v<T, bf16> ? Digits::rough : Digits::all;

template <Activation kKind, class T>
void forward(const ActivationArgs& a) {
  each_piece(a.gate_rows.count, a.cols, [&](int64_t row, int64_t first, int64_t last) {
    const T* gate = reinterpret_cast<const T*>(a.gate) + a.gate_rows.offset(row) + first;
    T* out = reinterpret_cast<T*>(a.out) + row * a.cols + first;
    if (!a.up)
      return each<1, 1>(last - first, {gate}, {out}, [](const V* x, V* y) __attribute__((always_inline)) {
        y[0] = activate<kKind, kDigitsOf<T>>(x[0], nullptr);
      });
    const T* up = reinterpret_cast<const T*>(a.up) + a.up_rows.offset(row) + first;
    each<2, 1>(last - first, {gate, up}, {out}, [](const V* x, V* y) __attribute__((always_inline)) {
      y[0] = activate<kKind, kDigitsOf<T>>(x[0], nullptr) * x[1];
    });
  });
}

template <Activation kKind, class T>
void backward(const ActivationBackwardArgs& a) {
  each_piece(a.gate_rows.count, a.cols, [&](int64_t row, int64_t first, int64_t last) {
    const T* dy = reinterpret_cast<const T*>(a.dy) + a.dy_rows.offset(row) + first;
    const T* gate = reinterpret_cast<const T*>(a.gate) + a.gate_rows.offset(row) + first;
    T* dgate = reinterpret_cast<T*>(a.dgate) + row * a.cols + first;
    if (!a.up)
      return each<2, 1>(last - first, {gate, dy}, {dgate}, [](const V* x, V* y) __attribute__((always_inline)) {
        V slope;
        activate<kKind, kDigitsOf<T>>(x[0], &slope);
        y[0] = x[1] * slope;
      });
    const T* up = reinterpret_cast<const T*>(a.up) + a.up_rows.offset(row) + first;
    T* dup = reinterpret_cast<T*>(a.dup) + row * a.cols + first;
    each<3, 2>(last - first, {gate, dy, up}, {dgate, dup}, [](const V* x, V* y) __attribute__((always_inline)) {
      V slope;
      const V f = activate<kKind, kDigitsOf<T>>(x[0], &slope);
      y[0] = x[1] * x[2] * slope;
      y[1] = x[1] * f;
    });
  });
}

template <class F>
void with_kind(Activation kind, const F& f) {
  switch (kind) {
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>());
    case Activation::gelu_tanh:
      return f(std::integral_constant<Activation, Activation::gelu_tanh>());
    case Activation::silu:
      return f(std::integral_constant<Activation, Activation::silu>());
    case Activation::sigmoid:
      return f(std::integral_constant<Activation, Activation::sigmoid>());
    case Activation::tanh:
      return f(std::integral_constant<Activation, Activation::tanh>());
    case Activation::relu_squared:
      return f(std::integral_constant<Activation, Activation::relu_squared>());
  }
}

}  // namespace

void activation_forward(const ActivationArgs& a) {
  with_kind(a.kind, [&](auto kind) {
    with_dtype(a.dtype, [&](auto* tag) { forward<kind, std::remove_pointer_t<decltype(tag)>>(a); });
  });
}

void activation_backward(const ActivationBackwardArgs& a) {
  with_kind(a.kind, [&](auto kind) {
    with_dtype(a.dtype, [&](auto* tag) { backward<kind, std::remove_pointer_t<decltype(tag)>>(a); });
  });
}

}  // namespace pyllm::ISA

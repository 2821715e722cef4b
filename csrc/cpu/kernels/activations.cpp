// Activations, plain and gated. Every element stands alone, so a call is one walk over memory, in pieces of a row that
// threads take; its floor is the memory it reads and writes. Backward recomputes f and its slope from the input and
// writes both gradients of a gated form in the same walk.
//
// gelu(x) = x times the normal distribution's mass below x, which is computed from its tail: exact to a few units in the
// last place also where x is very negative and 1 + erf(x) would cancel. Likewise its tanh form is x sigmoid(2 u).
#include "cpu/activations.h"

#include <algorithm>
#include <type_traits>

#include "cpu/kernels/vec.h"

namespace pyllm::ISA {
namespace {

constexpr int64_t kPiece = 4096;

VEC V within(V x, float limit) {  // NaN stays NaN
  return max(set(-limit), min(set(limit), x));
}

// f(x), and its slope where it is asked for.
template <Activation kKind>
VEC V activate(V x, V* slope) {
  if constexpr (kKind == Activation::gelu) {
    V bell;
    const V a = min(set(14.0f), abs(x)), tail = normal_tail(a, bell);  // beyond, the tail is 0
    if (slope) *slope = fma(x * 0.39894228040143268f, bell, x < 0.0f ? tail : 1.0f - tail);
    return fma(-a, tail, max(V{}, x));
  } else if constexpr (kKind == Activation::gelu_tanh) {
    constexpr float kTwice = 1.5957691216057308f, kCube = 0.044715f;  // 2 sqrt(2 / pi)
    const V c = within(x, 13.0f), z = c * c;                          // beyond, the sigmoid is 0 or 1
    const V s = sigmoid(c * kTwice * fma(z, set(kCube), set(1.0f)));
    if (slope) *slope = fma(c * s * (1.0f - s), kTwice * fma(z, set(3 * kCube), set(1.0f)), s);
    return x * s;
  } else if constexpr (kKind == Activation::silu) {
    const V s = sigmoid(x);
    if (slope) *slope = s * fma(x, 1.0f - s, set(1.0f));
    return x * s;
  } else if constexpr (kKind == Activation::sigmoid) {
    const V s = sigmoid(x);
    if (slope) *slope = s * (1.0f - s);
    return s;
  } else if constexpr (kKind == Activation::tanh) {
    const V y = tanh(x);
    if (slope) *slope = fma(-y, y, set(1.0f));
    return y;
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
  const int64_t grain = std::max<int64_t>(1, 2 * kPiece / (std::min(cols, kPiece) + 16));
  parallel_for(rows * across, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = i % across * kPiece;
      body(i / across, first, std::min(first + kPiece, cols));
    }
  });
}

template <class F>
VEC void each(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, W);
  if (i < n) f(i, n - i);
}

template <Activation kKind, class T>
void forward(const ActivationArgs& a) {
  each_piece(a.gate_rows.count, a.cols, [&](int64_t row, int64_t first, int64_t last) {
    const T* gate = reinterpret_cast<const T*>(a.gate) + a.gate_rows.offset(row) + first;
    T* out = reinterpret_cast<T*>(a.out) + row * a.cols + first;
    if (!a.up)
      return each(last - first,
                  [&](int64_t i, int64_t n) { write(out + i, activate<kKind>(get(gate + i, n), nullptr), n); });
    const T* up = reinterpret_cast<const T*>(a.up) + a.up_rows.offset(row) + first;
    each(last - first,
         [&](int64_t i, int64_t n) { write(out + i, activate<kKind>(get(gate + i, n), nullptr) * get(up + i, n), n); });
  });
}

template <Activation kKind, class T>
void backward(const ActivationBackwardArgs& a) {
  each_piece(a.gate_rows.count, a.cols, [&](int64_t row, int64_t first, int64_t last) {
    const T* dy = reinterpret_cast<const T*>(a.dy) + a.dy_rows.offset(row) + first;
    const T* gate = reinterpret_cast<const T*>(a.gate) + a.gate_rows.offset(row) + first;
    T* dgate = reinterpret_cast<T*>(a.dgate) + row * a.cols + first;
    if (!a.up)
      return each(last - first, [&](int64_t i, int64_t n) {
        V slope;
        activate<kKind>(get(gate + i, n), &slope);
        write(dgate + i, get(dy + i, n) * slope, n);
      });
    const T* up = reinterpret_cast<const T*>(a.up) + a.up_rows.offset(row) + first;
    T* dup = reinterpret_cast<T*>(a.dup) + row * a.cols + first;
    each(last - first, [&](int64_t i, int64_t n) {
      V slope;
      const V y = activate<kKind>(get(gate + i, n), &slope), g = get(dy + i, n);
      write(dup + i, g * y, n);
      write(dgate + i, g * get(up + i, n) * slope, n);
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

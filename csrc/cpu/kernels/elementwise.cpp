// Copies and plain arithmetic between tensors of any strides: what a model does between its products, so that a recorded
// step needs nothing else. Rows of the innermost dimension run in parallel, in vectors where their steps are 0 or 1. The
// floor is the memory read and written; at one row a step, it is the call.
#include "cpu/elementwise.h"

#include <algorithm>
#include <type_traits>

#include "cpu/kernels/each.h"

namespace pyllm::ISA {
namespace {

// Elements that are worth a thread, where they lie side by side and where each is fetched by itself.
constexpr int64_t kGrain = 32768, kApartGrain = 8192;

bool floating(DType t) { return t == DType::f32 || t == DType::bf16 || t == DType::f16; }

template <Elementwise kKind, class X>
VEC X compute(X a, X b) {
  if constexpr (kKind == Elementwise::add) return a + b;
  if constexpr (kKind == Elementwise::subtract) return a - b;
  if constexpr (kKind == Elementwise::multiply) return a * b;
  if constexpr (kKind == Elementwise::divide) return a / b;
  return a;
}

VEC V get_any(const char* p, DType t, int64_t i, int64_t n) {
  if (t == DType::f32) return get(reinterpret_cast<const float*>(p) + i, n);
  if (t == DType::bf16) return get(reinterpret_cast<const bf16*>(p) + i, n);
  return get(reinterpret_cast<const f16*>(p) + i, n);
}
VEC void write_any(char* p, DType t, int64_t i, V v, int64_t n) {
  if (t == DType::f32) return write(reinterpret_cast<float*>(p) + i, v, n);
  if (t == DType::bf16) return write(reinterpret_cast<bf16*>(p) + i, v, n);
  write(reinterpret_cast<f16*>(p) + i, v, n);
}
// n elements `step` apart.
VEC V gather_any(const char* p, DType t, int64_t i, int64_t n, int64_t step) {
  if (step == 1) return get_any(p, t, i, n);
  if (step == 0) return set(get_any(p, t, 0, 1)[0]);
  V v{};
  for (int64_t k = 0; k < n; k++) v[k] = get_any(p, t, (i + k) * step, 1)[0];
  return v;
}
VEC void scatter_any(char* p, DType t, int64_t i, V v, int64_t n, int64_t step) {
  if (step == 1) return write_any(p, t, i, v, n);
  for (int64_t k = 0; k < n; k++) write_any(p, t, (i + k) * step, set(v[k]), 1);
}

template <Elementwise kKind>
constexpr bool kBinary = kKind != Elementwise::copy && kKind != Elementwise::relu;

template <Elementwise kKind>
VEC V result(V x, V y) {
  if constexpr (kKind == Elementwise::relu) return max(V{}, x);  // NaN stays NaN
  return compute<kKind>(x, y);
}

template <Elementwise kKind>
void float_row(const ElementwiseArgs& a, const char* x, const char* y, char* out, int64_t begin, int64_t end) {
  const int last = a.ndim - 1;
  const int64_t x_step = a.a_step[last], y_step = kBinary<kKind> ? a.b_step[last] : 1, out_step = a.out_step[last];
  if (x_step == 1 && y_step == 1 && out_step == 1 && a.a_dtype == a.b_dtype && a.a_dtype == a.out_dtype)
    return with_dtype(a.a_dtype, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      const T* p = reinterpret_cast<const T*>(x) + begin;
      T* to = reinterpret_cast<T*>(out) + begin;
      if constexpr (kBinary<kKind>)
        each<2, 1>(end - begin, {p, reinterpret_cast<const T*>(y) + begin}, {to},
                   [](const V* v, V* r) __attribute__((always_inline)) { r[0] = result<kKind>(v[0], v[1]); });
      else
        each<1, 1>(end - begin, {p}, {to},
                   [](const V* v, V* r) __attribute__((always_inline)) { r[0] = result<kKind>(v[0], V{}); });
    });
  for (int64_t i = begin; i < end; i += W) {
    const int64_t n = std::min<int64_t>(W, end - i);
    const V v = gather_any(x, a.a_dtype, i, n, x_step);
    const V w = kBinary<kKind> ? gather_any(y, a.b_dtype, i, n, y_step) : V{};
    scatter_any(out, a.out_dtype, i, result<kKind>(v, w), n, out_step);
  }
}

template <class T>
void copy_row(const ElementwiseArgs& a, const char* x, char* out, int64_t begin, int64_t end) {
  const int64_t from = a.a_step[a.ndim - 1], to = a.out_step[a.ndim - 1];
  const T* source = reinterpret_cast<const T*>(x);
  T* target = reinterpret_cast<T*>(out);
  if (from == 1 && to == 1) {
    if (end > begin) std::memcpy(target + begin, source + begin, (end - begin) * sizeof(T));
    return;
  }
  for (int64_t i = begin; i < end; i++) target[i * to] = source[i * from];
}

template <Elementwise kKind>
void int_row(const ElementwiseArgs& a, const char* x, const char* y, char* out, int64_t begin, int64_t end) {
  const int last = a.ndim - 1;
  for (int64_t i = begin; i < end; i++) {
    const int64_t p = reinterpret_cast<const int64_t*>(x)[i * a.a_step[last]];
    const int64_t q = reinterpret_cast<const int64_t*>(y)[i * a.b_step[last]];
    int64_t r;
    if constexpr (kKind == Elementwise::minimum)
      r = std::min(p, q);
    else if constexpr (kKind == Elementwise::maximum)
      r = std::max(p, q);
    else  // unsigned: overflow wraps, as in torch
      r = static_cast<int64_t>(compute<kKind>(static_cast<uint64_t>(p), static_cast<uint64_t>(q)));
    reinterpret_cast<int64_t*>(out)[i * a.out_step[last]] = r;
  }
}

template <Elementwise kKind>
void row(const ElementwiseArgs& a, const char* x, const char* y, char* out, int64_t begin, int64_t end) {
  if constexpr (kKind == Elementwise::copy)
    if (a.a_dtype == a.out_dtype) switch (size_of(a.a_dtype)) {
        case 8:
          return copy_row<uint64_t>(a, x, out, begin, end);
        case 4:
          return copy_row<uint32_t>(a, x, out, begin, end);
        case 2:
          return copy_row<uint16_t>(a, x, out, begin, end);
        default:
          return copy_row<uint8_t>(a, x, out, begin, end);
      }
  if constexpr (kKind == Elementwise::minimum || kKind == Elementwise::maximum)
    return int_row<kKind>(a, x, y, out, begin, end);
  else if constexpr (kKind == Elementwise::add || kKind == Elementwise::subtract || kKind == Elementwise::multiply)
    if (!floating(a.a_dtype)) return int_row<kKind>(a, x, y, out, begin, end);
  float_row<kKind>(a, x, y, out, begin, end);
}

// A copy whose source runs along the second innermost dimension: blocks are read by lines, and written by lines from
// where they are then. Lines of a source whose rows are a power of two apart would crowd each other out of the cache.
template <class T>
void copy_transposed(const ElementwiseArgs& a) {
  constexpr int64_t kSide = 64, kStep = kSide + 64 / sizeof(T);
  const int last = a.ndim - 1;
  const int64_t rows = a.shape[last - 1], cols = a.shape[last], strips = (rows + kSide - 1) / kSide;
  int64_t planes = 1;
  for (int d = 0; d < last - 1; d++) planes *= a.shape[d];
  parallel_for(planes * strips, std::max<int64_t>(1, kGrain / (kSide * cols)), [&](int64_t begin, int64_t end) {
    alignas(64) T block[kSide * kStep];
    for (int64_t piece = begin; piece < end; piece++) {
      const int64_t row = piece % strips * kSide, height = std::min(kSide, rows - row);
      const T* x = reinterpret_cast<const T*>(a.a) + row;
      T* out = reinterpret_cast<T*>(a.out) + row * a.out_step[last - 1];
      int64_t rest = piece / strips;
      for (int d = last - 2; d >= 0; rest /= a.shape[d--]) {
        x += rest % a.shape[d] * a.a_step[d];
        out += rest % a.shape[d] * a.out_step[d];
      }
      for (int64_t col = 0; col < cols; col += kSide) {
        const int64_t width = std::min(kSide, cols - col);
        for (int64_t j = 0; j < width; j++)
          std::memcpy(block + j * kStep, x + (col + j) * a.a_step[last], height * sizeof(T));
        for (int64_t i = 0; i < height; i++)
          for (int64_t j = 0; j < width; j++) out[i * a.out_step[last - 1] + col + j] = block[j * kStep + i];
      }
    }
  });
}

bool transposes(const ElementwiseArgs& a) {
  const int last = a.ndim - 1;
  constexpr int64_t kLeast = 16;  // rows, of which fewer are not worth the detour
  return a.a_dtype == a.out_dtype && a.ndim >= 2 && a.shape[last - 1] >= kLeast && a.a_step[last - 1] == 1 &&
         a.a_step[last] > 1 && a.out_step[last] == 1;
}

template <Elementwise kKind>
void walk(const ElementwiseArgs& a) {
  const int last = a.ndim - 1;
  const bool apart = a.a_step[last] > 1 || a.b_step[last] > 1 || a.out_step[last] > 1;
  const int64_t grain = apart ? kApartGrain : kGrain;
  const int64_t cols = a.shape[last], across = std::max<int64_t>(1, (cols + grain - 1) / grain);
  int64_t rows = 1;
  for (int d = 0; d < last; d++) rows *= a.shape[d];
  parallel_for(rows * across, std::max<int64_t>(1, grain / (std::min(cols, grain) + 1)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t piece = begin; piece < end; piece++) {
                   int64_t rest = piece / across, x = 0, y = 0, out = 0;
                   for (int d = last - 1; d >= 0; rest /= a.shape[d--]) {
                     const int64_t i = rest % a.shape[d];
                     x += i * a.a_step[d], y += i * a.b_step[d], out += i * a.out_step[d];
                   }
                   const int64_t first = piece % across * grain;
                   row<kKind>(a, a.a + x * size_of(a.a_dtype), a.b ? a.b + y * size_of(a.b_dtype) : nullptr,
                              a.out + out * size_of(a.out_dtype), first, std::min(first + grain, cols));
                 }
               });
}

}  // namespace

void elementwise(const ElementwiseArgs& a) {
  switch (a.kind) {
    case Elementwise::copy:
      if (transposes(a)) switch (size_of(a.a_dtype)) {
          case 8:
            return copy_transposed<uint64_t>(a);
          case 4:
            return copy_transposed<uint32_t>(a);
          case 2:
            return copy_transposed<uint16_t>(a);
          default:
            return copy_transposed<uint8_t>(a);
        }
      return walk<Elementwise::copy>(a);
    case Elementwise::add:
      return walk<Elementwise::add>(a);
    case Elementwise::subtract:
      return walk<Elementwise::subtract>(a);
    case Elementwise::multiply:
      return walk<Elementwise::multiply>(a);
    case Elementwise::divide:
      return walk<Elementwise::divide>(a);
    case Elementwise::relu:
      return walk<Elementwise::relu>(a);
    case Elementwise::minimum:
      return walk<Elementwise::minimum>(a);
    case Elementwise::maximum:
      return walk<Elementwise::maximum>(a);
  }
}

}  // namespace pyllm::ISA

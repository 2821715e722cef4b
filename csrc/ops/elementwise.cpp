#include "cpu/elementwise.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string>

#include "cuda/elementwise.h"
#include "ops/ops.h"
#include "ops/place.h"

namespace pyllm::ops {
namespace {

constexpr const char* kNames[] = {"copy", "add", "subtract", "multiply", "divide", "relu", "minimum", "maximum"};

Elementwise kind_of(const std::string& name) {
  for (size_t i = 0; i < std::size(kNames); i++)
    if (name == kNames[i]) return static_cast<Elementwise>(i);
  fail(Error::value,
       "[elementwise] kind must be 'copy', 'add', 'subtract', 'multiply', 'divide', 'relu', 'minimum' or 'maximum', "
       "but got '",
       name, "'");
}

bool floating(DType t) { return t == DType::f32 || t == DType::bf16 || t == DType::f16; }

// t's steps over out's dimensions, those that it lacks or repeats along being 0.
void steps_over(const char* name, const TensorView& t, const TensorView& out, int64_t* steps) {
  bool fits = t.ndim <= out.ndim;
  for (int i = 0; fits && i < t.ndim; i++) {
    const int d = out.ndim - t.ndim + i;
    fits = t.size(i) == out.size(d) || t.size(i) == 1;
    steps[d] = t.size(i) == 1 ? 0 : t.step(i);
  }
  check(fits, "[elementwise] ", name, " must broadcast to ", out.shape_text(), ", but got ", t.shape_text());
}

// Where a tensor's elements lie: the bytes that they span, and the dimensions along which they are apart.
struct Layout {
  uintptr_t first;
  int64_t size, span;
  int ndim = 0;
  int64_t count[kMaxDims], step[kMaxDims];  // of bytes, and forwards

  explicit Layout(const TensorView& t) : first(reinterpret_cast<uintptr_t>(t.data)), size(size_of(t.dtype)) {
    span = size;
    for (int d = 0; d < t.ndim; d++) {
      if (t.size(d) == 1) continue;
      const int64_t bytes = t.step(d) * size;
      if (bytes < 0) first += bytes * (t.size(d) - 1);
      count[ndim] = t.size(d);
      step[ndim++] = std::abs(bytes);
      span += std::abs(bytes) * (t.size(d) - 1);
    }
  }
  // The same of what is left of each element's place when it is divided by `modulus`, if that is a step.
  int64_t span_within(int64_t modulus) const {
    int64_t within = size;
    for (int d = 0; d < ndim; d++)
      if (step[d] % modulus != 0) within += step[d] * (count[d] - 1);
    return within;
  }
};

// Each element has a place of its own.
bool lies_apart(const TensorView& t) {
  if (t.contiguous()) return true;
  Layout l(t);
  int64_t span = l.size;
  for (; l.ndim > 0; l.ndim--) {  // the smallest step of those left must be beyond what lies within it
    const auto least = std::min_element(l.step, l.step + l.ndim) - l.step;
    if (l.step[least] < span) return false;
    span += l.step[least] * (l.count[least] - 1);
    l.step[least] = l.step[l.ndim - 1], l.count[least] = l.count[l.ndim - 1];
  }
  return true;
}

// No element of one lies where the other has one: they are apart as a whole, or by columns of some width that both have.
bool lie_apart(const TensorView& s, const TensorView& t) {
  const Layout a(s), b(t);
  if (a.first + a.span <= b.first || b.first + b.span <= a.first) return true;
  for (const Layout* l : {&a, &b})
    for (int d = 0; d < l->ndim; d++) {
      const int64_t width = l->step[d];
      if (width == 0) continue;
      int64_t between = static_cast<int64_t>(b.first - a.first) % width;
      if (between < 0) between += width;
      if (between >= a.span_within(width) && between + b.span_within(width) <= width) return true;
    }
  return false;
}

// What is written must be read by none, or by its own element alone.
void check_overlap(const char* name, const TensorView& t, const int64_t* steps, const TensorView& out) {
  bool same = t.data == out.data && size_of(t.dtype) == size_of(out.dtype);
  for (int d = 0; d < out.ndim; d++) same = same && (out.size(d) == 1 || steps[d] == out.step(d));
  check(same || lie_apart(t, out), "[elementwise] out must be ", name,
        " itself or lie apart from it, but they overlap");
}

}  // namespace

void elementwise(const std::string& kind_name, const TensorView& a, const TensorView& b, const TensorView& out) {
  const char* op = "elementwise";
  const Elementwise kind = kind_of(kind_name);
  const bool binary = kind != Elementwise::copy && kind != Elementwise::relu;
  const Place place(op, "a", a);
  check_device(op, "a", a);
  check_device(op, "out", out);
  check_writable(op, "out", out);
  if (binary != b.present()) fail(Error::type, "[", op, "] ", kind_name, binary ? " needs b" : " takes no b");
  if (binary) check_device(op, "b", b);
  const DType b_dtype = binary ? b.dtype : a.dtype;
  const bool ordering = kind == Elementwise::minimum || kind == Elementwise::maximum;
  const bool numbers = !ordering && floating(a.dtype) && floating(b_dtype) && floating(out.dtype);
  const bool integers = binary && kind != Elementwise::divide && a.dtype == DType::i64 && b_dtype == DType::i64 &&
                        out.dtype == DType::i64;
  const bool copied = kind == Elementwise::copy && a.dtype == out.dtype;
  if (!numbers && !integers && !copied)
    fail(Error::type, "[", op, "] ", kind_name, " must be of ",
         ordering                    ? "int64 alone"
         : kind == Elementwise::copy ? "float32, bfloat16 and float16, or to the same dtype"
                                     : "float32, bfloat16 and float16, or of int64 alone",
         ", but got ", name_of(a.dtype), ", ", name_of(b_dtype), " and ", name_of(out.dtype));
  ElementwiseArgs args{kind,    a.dtype, b_dtype, out.dtype, 0, {}, {}, {}, {}, a.data, binary ? b.data : nullptr,
                       out.data};
  int64_t a_step[kMaxDims] = {}, b_step[kMaxDims] = {};
  steps_over("a", a, out, a_step);
  if (binary) steps_over("b", b, out, b_step);
  if (out.numel() == 0) return;
  check(lies_apart(out), "[elementwise] out must have a place for each element, but some of shape ", out.shape_text(),
        " share one");
  check_overlap("a", a, a_step, out);
  if (binary) check_overlap("b", b, b_step, out);
  // Neighbouring dimensions that all three walk as one become one.
  for (int d = 0; d < out.ndim; d++) {
    const int64_t n = out.size(d);
    if (n == 1) continue;
    const int at = args.ndim - 1;
    if (at >= 0 && args.a_step[at] == a_step[d] * n && args.b_step[at] == b_step[d] * n &&
        args.out_step[at] == out.step(d) * n) {
      args.shape[at] *= n;
      args.a_step[at] = a_step[d], args.b_step[at] = b_step[d], args.out_step[at] = out.step(d);
      continue;
    }
    args.shape[args.ndim] = n;
    args.a_step[args.ndim] = a_step[d], args.b_step[args.ndim] = b_step[d], args.out_step[args.ndim++] = out.step(d);
  }
  if (args.ndim == 0) args.ndim = 1, args.shape[0] = 1;
  if (out.contiguous()) place.prefer_large_pages(out);
  place.cuda() ? cuda::elementwise(args, place.work()) : pyllm::elementwise(args);
}

}  // namespace pyllm::ops

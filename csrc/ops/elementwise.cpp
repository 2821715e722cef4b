#include "cpu/elementwise.h"

#include <iterator>

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
  place.cuda() ? cuda::elementwise(args, place.work()) : pyllm::elementwise(args);
}

}  // namespace pyllm::ops

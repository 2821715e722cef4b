#include "cpu/linear.h"

#include "ops/ops.h"

namespace pyllm::ops {

void matmul(const TensorView& a, const TensorView& b, const TensorView& bias, const TensorView& c) {
  const char* op = "matmul";
  check_float(op, "a", a);
  check_float(op, "b", b);
  check_float(op, "c", c);
  check_ndim(op, "a", a, 2);
  check_shape(op, "b", b, a.size(1), b.ndim == 2 ? b.size(1) : 0);
  check_shape(op, "c", c, a.size(0), b.size(1));
  check_contiguous(op, "c", c);
  check_writable(op, "c", c);
  if (bias.present()) {
    check_float(op, "bias", bias);
    check_shape(op, "bias", bias, b.size(1));
    check_contiguous(op, "bias", bias);
  }
  pyllm::matmul({a.size(0), b.size(1), a.size(1), a.data, b.data, bias.data, c.data, a.dtype, b.dtype, bias.dtype,
                 c.dtype, a.step(0), a.step(1), b.step(0), b.step(1)});
}

void column_sum(const TensorView& a, const TensorView& sums) {
  const char* op = "column_sum";
  check_float(op, "a", a);
  check_ndim(op, "a", a, 2);
  check_inner_stride(op, "a", a);
  check_float(op, "sums", sums);
  check_shape(op, "sums", sums, a.size(1));
  check_contiguous(op, "sums", sums);
  check_writable(op, "sums", sums);
  pyllm::column_sum({a.size(0), a.size(1), a.data, sums.data, a.dtype, sums.dtype, a.step(0)});
}

}  // namespace pyllm::ops

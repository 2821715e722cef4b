#include "cpu/linear.h"

#include "cpu/pages.h"
#include "cuda/column_sum.h"
#include "ops/ops.h"
#include "ops/place.h"

namespace pyllm::ops {

void linear(const TensorView& x, const TensorView& weight, const TensorView& bias, const TensorView& y, bool packed) {
  const char* op = "linear";
  check_float(op, "x", x);
  check(x.ndim >= 1, "[linear] x must have at least 1 dimension, but got a scalar");
  check_dtype(op, "weight", weight, x.dtype);
  const int64_t k = x.size(-1), n = y.ndim ? y.size(-1) : 0;
  if (packed) {
    check(weight.ndim == 3 && weight.size(2) == panel_width(), "[linear] weight must be packed for ", cpu::isa_name(),
          ", in panels of ", panel_width(), " columns, but got shape ", weight.shape_text(), ": pack it again");
    check_shape(op, "weight", weight, (n + panel_width() - 1) / panel_width(), panel_rows(k, x.dtype), panel_width());
    check_contiguous(op, "weight", weight);
  } else {
    check(weight.ndim == 2 && weight.size(1) == k, "[linear] x (..., K) and weight (N, K) must share K, but got ",
          x.shape_text(), " and ", weight.shape_text());
    check(weight.size(0) == n, "[linear] y must have ", weight.size(0), " columns, but got ", n);
  }
  if (bias.present()) {
    check_dtype(op, "bias", bias, x.dtype);
    check_shape(op, "bias", bias, n);
    check_contiguous(op, "bias", bias);
  }
  const Rows rows = x.rows();
  check(rows.levels <= 1, "[linear] the leading dimensions of x must be evenly spaced");
  check_dtype(op, "y", y, x.dtype);
  check(y.numel() == rows.count * n, "[linear] y must have ", rows.count, " rows, but got shape ", y.shape_text());
  check_contiguous(op, "y", y);
  check_writable(op, "y", y);
  cpu::prefer_large_pages(y.data, y.numel() * size_of(y.dtype));
  pyllm::matmul({rows.count, n, k, x.data, weight.data, bias.data, y.data, x.dtype, x.dtype, x.dtype, x.dtype,
                 rows.step[0], x.step(-1), packed ? 0 : weight.step(1), packed ? 0 : weight.step(0), packed});
}

void pack_linear(const TensorView& weight, const TensorView& panels) {
  const char* op = "pack_linear";
  check_float(op, "weight", weight);
  check_ndim(op, "weight", weight, 2);
  const int64_t width = panel_width(), n = weight.size(0), k = weight.size(1);
  check_dtype(op, "panels", panels, weight.dtype);
  check_shape(op, "panels", panels, (n + width - 1) / width, panel_rows(k, weight.dtype), width);
  check_contiguous(op, "panels", panels);
  check_writable(op, "panels", panels);
  cpu::prefer_large_pages(panels.data, panels.numel() * size_of(panels.dtype));
  pyllm::pack_weight({n, k, weight.data, panels.data, weight.dtype, weight.step(1), weight.step(0)});
}

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
  cpu::prefer_large_pages(c.data, c.numel() * size_of(c.dtype));
  pyllm::matmul({a.size(0), b.size(1), a.size(1), a.data, b.data, bias.data, c.data, a.dtype, b.dtype, bias.dtype,
                 c.dtype, a.step(0), a.step(1), b.step(0), b.step(1), false, true});
}

void column_sum(const TensorView& a, const TensorView& sums) {
  const char* op = "column_sum";
  const Place place(op, "a", a);
  check_float(op, "a", a);
  check_ndim(op, "a", a, 2);
  check_inner_stride(op, "a", a);
  check_float(op, "sums", sums);
  check_shape(op, "sums", sums, a.size(1));
  check_contiguous(op, "sums", sums);
  check_writable(op, "sums", sums);
  const ColumnSumArgs args{a.size(0), a.size(1), a.data, sums.data, a.dtype, sums.dtype, a.step(0)};
  place.cuda() ? cuda::column_sum(args, place.work()) : pyllm::column_sum(args);
}

}  // namespace pyllm::ops

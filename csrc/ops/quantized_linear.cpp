#include "cpu/quantized_linear.h"

#include "cpu/linear.h"
#include "ops/ops.h"

namespace pyllm::ops {
namespace {

QuantizedWeight weight_of(const char* op, int64_t n, int64_t groups, int64_t bits, DType scale_dtype,
                          bool has_minimums) {
  check(bits == 8 || bits == 4, "[", op, "] bits must be 8 or 4, but got ", bits);
  return {n, groups, static_cast<int>(bits), scale_dtype, has_minimums};
}

int64_t panel_count(int64_t n) { return (n + panel_width() - 1) / panel_width(); }

}  // namespace

void pack_quantized(const TensorView& values, const TensorView& scales, const TensorView& minimums,
                    const TensorView& panels, int64_t bits) {
  const char* op = "pack_quantized";
  check_cpu(op, "scales", scales);
  if (scales.dtype != DType::f16 && scales.dtype != DType::f32)
    fail(Error::type, "[", op, "] scales must be float16 or float32, but got ", name_of(scales.dtype));
  check_ndim(op, "scales", scales, 2);
  check_contiguous(op, "scales", scales);
  const QuantizedWeight weight = weight_of(op, scales.size(0), scales.size(1), bits, scales.dtype, minimums.present());
  check_dtype(op, "values", values, DType::u8);
  check_shape(op, "values", values, weight.n, weight.groups * kGroup * bits / 8);
  check_contiguous(op, "values", values);
  if (minimums.present()) {
    check_dtype(op, "minimums", minimums, scales.dtype);
    check_shape(op, "minimums", minimums, weight.n, weight.groups);
    check_contiguous(op, "minimums", minimums);
  }
  check_dtype(op, "panels", panels, DType::u8);
  check_shape(op, "panels", panels, panel_count(weight.n), weight.groups, weight.group_bytes(panel_width()));
  check_contiguous(op, "panels", panels);
  check_writable(op, "panels", panels);
  pyllm::pack_quantized({weight, values.as<uint8_t>(), scales.data, minimums.data, panels.data});
}

void quantized_linear(const TensorView& x, const TensorView& panels, const TensorView& bias, const TensorView& y,
                      int64_t bits, bool half_scales, bool has_minimums) {
  const char* op = "quantized_linear";
  check_float(op, "x", x);
  check(x.ndim >= 1, "[quantized_linear] x must have at least 1 dimension, but got a scalar");
  const int64_t k = x.size(-1), n = y.ndim ? y.size(-1) : 0;
  const QuantizedWeight weight =
      weight_of(op, n, (k + kGroup - 1) / kGroup, bits, half_scales ? DType::f16 : DType::f32, has_minimums);
  check_dtype(op, "weight", panels, DType::u8);
  check(panels.ndim == 3 && panels.size(2) == weight.group_bytes(panel_width()),
        "[quantized_linear] weight must be packed for ", cpu::isa_name(), ", in panels of ", panel_width(),
        " columns, but got shape ", panels.shape_text(), ": pack it again");
  check_shape(op, "weight", panels, panel_count(n), weight.groups, weight.group_bytes(panel_width()));
  check_contiguous(op, "weight", panels);
  if (bias.present()) {
    check_dtype(op, "bias", bias, x.dtype);
    check_shape(op, "bias", bias, n);
    check_contiguous(op, "bias", bias);
  }
  check_inner_stride(op, "x", x);
  const Rows rows = x.rows();
  check(rows.levels <= 1, "[quantized_linear] the leading dimensions of x must be evenly spaced");
  check_dtype(op, "y", y, x.dtype);
  check(y.numel() == rows.count * n, "[quantized_linear] y must have ", rows.count, " rows, but got shape ",
        y.shape_text());
  check_contiguous(op, "y", y);
  check_writable(op, "y", y);
  pyllm::quantized_linear({weight, rows.count, k, rows.step[0], x.data, panels.data,
                           bias.present() ? bias.data : nullptr, y.data, x.dtype});
}

}  // namespace pyllm::ops

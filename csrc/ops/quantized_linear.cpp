#include "cpu/quantized_linear.h"

#include "cpu/linear.h"
#include "cpu/pages.h"
#include "cuda/quantized_linear.h"
#include "ops/ops.h"
#include "ops/packed_weight.h"
#include "ops/place.h"

namespace pyllm::ops {
namespace {

QuantizedWeight weight_of(const char* op, int64_t n, int64_t groups, int64_t bits, int64_t group, DType scale_dtype,
                          bool has_minimums) {
  check(bits == 8 || bits == 4, "[", op, "] bits must be 8 or 4, but got ", bits);
  const bool larger = (bits == 4 || !has_minimums) && (group == 64 || group == 128 || group == 256);
  check(group == 32 || (group == 16 && bits == 8) || larger, "[", op,
        "] groups must be of 32 elements, of 16 of 8 bits or, but not of 8 bits with minimums, of 64, 128 or 256, but "
        "got ",
        group);
  const int64_t span = larger ? group / 32 : 1;
  return {n, groups, group / span, span, static_cast<int>(bits), scale_dtype, has_minimums};
}

int64_t panels_of(int64_t n, int64_t width) { return (n + width - 1) / width; }

void check_whole(const char* op, const QuantizedWeight& weight, const char* panels) {
  bool whole = true;
  if (weight.in_units()) pyllm::check_units({weight, panels, &whole});
  check(whole, "[", op, "] scales", weight.has_minimums ? " and minimums" : "", " of 4 bits in groups of ",
        weight.span * weight.group, " must be whole multiples of 1/64 of the largest power of two that the group's ",
        "elements can reach, but are not");
}

}  // namespace

QuantizedWeight packed_weight(const char* op, const char* name, bool on_cuda, const TensorView& panels, int64_t n,
                              int64_t k, int64_t bits, int64_t group, bool half_scales, bool has_minimums) {
  QuantizedWeight weight = weight_of(op, n, 0, bits, group, half_scales ? DType::f16 : DType::f32, has_minimums);
  weight.groups = (k + weight.group - 1) / weight.group;
  check_dtype(op, name, panels, DType::u8);
  const int64_t width = quantized_panel_width(on_cuda);
  check(panels.ndim == 3 && panels.size(2) == weight.group_bytes(width), "[", op, "] ", name, " must be packed for ",
        on_cuda ? "CUDA" : cpu::isa_name(), ", in panels of ", width, " columns, but got shape ", panels.shape_text(),
        ": pack it again");
  check_shape(op, name, panels, panels_of(n, width), weight.groups, weight.group_bytes(width));
  check_contiguous(op, name, panels);
  check(!on_cuda || panels.numel() == 0 || reinterpret_cast<uintptr_t>(panels.data) % 16 == 0, "[", op, "] ", name,
        " must begin at a multiple of 16 bytes in the device's memory, but got one that does not");
  return weight;
}

int64_t quantized_panel_width(bool on_cuda) { return on_cuda ? cuda::kQuantizedPanel : panel_width(); }

void pack_quantized(const TensorView& values, const TensorView& scales, const TensorView& minimums,
                    const TensorView& panels, int64_t bits, int64_t group) {
  const char* op = "pack_quantized";
  check_device(op, "scales", scales);
  if (scales.dtype != DType::f16 && scales.dtype != DType::f32)
    fail(Error::type, "[", op, "] scales must be float16 or float32, but got ", name_of(scales.dtype));
  check_ndim(op, "scales", scales, 2);
  check_contiguous(op, "scales", scales);
  const QuantizedWeight weight =
      weight_of(op, scales.size(0), scales.size(1), bits, group, scales.dtype, minimums.present());
  check_dtype(op, "values", values, DType::u8);
  check_shape(op, "values", values, weight.n, weight.groups * weight.value_bytes());
  check_contiguous(op, "values", values);
  if (minimums.present()) {
    check_dtype(op, "minimums", minimums, scales.dtype);
    check_shape(op, "minimums", minimums, weight.n, weight.groups);
    check_contiguous(op, "minimums", minimums);
  }
  check_dtype(op, "panels", panels, DType::u8);
  check_shape(op, "panels", panels, panels_of(weight.n, panel_width()), weight.groups,
              weight.group_bytes(panel_width()));
  check_contiguous(op, "panels", panels);
  check_writable(op, "panels", panels);
  cpu::prefer_large_pages(panels.data, panels.numel());
  pyllm::pack_quantized({weight, values.as<uint8_t>(), scales.data, minimums.data, panels.data});
  check_whole(op, weight, panels.data);
}

void check_quantized(const TensorView& panels, int64_t n, int64_t k, int64_t bits, int64_t group, bool half_scales,
                     bool has_minimums) {
  const char* op = "pack_quantized";
  check_device(op, "panels", panels);
  check_whole(op, packed_weight(op, "panels", false, panels, n, k, bits, group, half_scales, has_minimums),
              panels.data);
}

void quantized_linear(const TensorView& x, const TensorView& panels, const TensorView& bias, const TensorView& y,
                      int64_t bits, int64_t group, bool half_scales, bool has_minimums) {
  const char* op = "quantized_linear";
  const Place place(op, "x", x);
  check_float(op, "x", x);
  check(x.ndim >= 1, "[quantized_linear] x must have at least 1 dimension, but got a scalar");
  const int64_t k = x.size(-1), n = y.ndim ? y.size(-1) : 0;
  const QuantizedWeight weight =
      packed_weight(op, "weight", place.cuda(), panels, n, k, bits, group, half_scales, has_minimums);
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
  const QuantizedLinearArgs args{
      weight, rows.count, k, rows.step[0], x.data, panels.data, bias.present() ? bias.data : nullptr, y.data, x.dtype};
  place.cuda() ? cuda::quantized_linear(args, place.work()) : pyllm::quantized_linear(args);
}

void quantized_linear_backward(const TensorView& dy, const TensorView& panels, const TensorView& dx, int64_t bits,
                               int64_t group, bool half_scales, bool has_minimums) {
  const char* op = "quantized_linear backward";
  const Place place(op, "dy", dy);
  check_float(op, "dy", dy);
  check_ndim(op, "dy", dy, 2);
  check_inner_stride(op, "dy", dy);
  check_dtype(op, "dx", dx, DType::f32);
  check_ndim(op, "dx", dx, 2);
  check_shape(op, "dx", dx, dy.size(0), dx.size(1));
  check_contiguous(op, "dx", dx);
  check_writable(op, "dx", dx);
  const QuantizedWeight weight =
      packed_weight(op, "weight", place.cuda(), panels, dy.size(1), dx.size(1), bits, group, half_scales, has_minimums);
  const QuantizedLinearBackwardArgs args{weight,  dy.size(0),  dx.size(1),     dy.step(0),
                                         dy.data, panels.data, dx.as<float>(), dy.dtype};
  place.cuda() ? cuda::quantized_linear_backward(args, place.work()) : pyllm::quantized_linear_backward(args);
}

void quantized_embedding(const TensorView& ids, const TensorView& panels, const TensorView& out, int64_t vocabulary,
                         int64_t bits, int64_t group, bool half_scales, bool has_minimums) {
  const char* op = "quantized_embedding";
  const Place place(op, "weight", panels);
  check_float(op, "out", out);
  check(out.ndim >= 1, "[quantized_embedding] out must have at least 1 dimension, but got a scalar");
  const int64_t k = out.size(-1);
  const QuantizedWeight weight =
      packed_weight(op, "weight", place.cuda(), panels, vocabulary, k, bits, group, half_scales, has_minimums);
  check_ids(op, "ids", ids, vocabulary);
  check(out.numel() == ids.numel() * k, "[", op, "] out must have a row of weight for each id, but got shape ",
        out.shape_text());
  check_contiguous(op, "out", out);
  check_writable(op, "out", out);
  const QuantizedEmbeddingArgs args{weight, ids.numel(), k, ids.dtype, out.dtype, ids.data, panels.data, out.data};
  place.cuda() ? cuda::quantized_embedding(args, place.work()) : pyllm::quantized_embedding(args);
}

}  // namespace pyllm::ops

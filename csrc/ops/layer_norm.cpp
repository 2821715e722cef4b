#include "cpu/layer_norm.h"

#include "cuda/layer_norm.h"
#include "ops/ops.h"
#include "ops/place.h"

namespace pyllm::ops {

namespace {

void check_rows(const char* op, const char* name, const TensorView& t, const TensorView& x) {
  check_dtype(op, name, t, x.dtype);
  check_shape(op, name, t, x.size(0), x.size(1));
  check_inner_stride(op, name, t);
}

void check_output(const char* op, const char* name, const TensorView& t, const TensorView& x) {
  check_rows(op, name, t, x);
  check_contiguous(op, name, t);
  check_writable(op, name, t);
}

void check_statistic(const char* op, const char* name, const TensorView& t, const TensorView& x) {
  check_dtype(op, name, t, DType::f32);
  check_shape(op, name, t, x.size(0));
  check_contiguous(op, name, t);
}

void check_parameter(const char* op, const char* name, const TensorView& t, const TensorView& x) {
  check_float(op, name, t);
  check_shape(op, name, t, x.size(1));
  check_contiguous(op, name, t);
}

}  // namespace

void norm_forward(const TensorView& x, const TensorView& residual, const TensorView& weight, const TensorView& bias,
                  const TensorView& y, const TensorView& sum, const TensorView& mean, const TensorView& rstd,
                  bool centred, double eps) {
  const char* op = centred ? "layer_norm" : "rms_norm";
  const Place place(op, "x", x);
  check_float(op, "x", x);
  check_ndim(op, "x", x, 2);
  check_inner_stride(op, "x", x);
  if (residual.present()) {
    check_rows(op, "residual", residual, x);
    check_output(op, "sum", sum, x);
  }
  if (weight.present()) check_parameter(op, "weight", weight, x);
  if (bias.present()) check_parameter(op, "bias", bias, x);
  if (bias.present()) check(weight.present(), "[", op, "] bias needs a weight");
  if (bias.present()) check_dtype(op, "bias", bias, weight.dtype);
  check_output(op, "y", y, x);
  if (mean.present()) check_statistic(op, "mean", mean, x);
  if (rstd.present()) check_statistic(op, "rstd", rstd, x);
  check(eps >= 0, "[", op, "] eps must be 0 or more, but got ", eps);
  place.prefer_large_pages(y);
  place.prefer_large_pages(sum);
  const NormArgs args{centred,     x.size(0),    x.size(1),        static_cast<float>(eps),
                      x.dtype,     weight.dtype, x.data,           residual.data,
                      weight.data, bias.data,    x.step(0),        residual.present() ? residual.step(0) : 0,
                      y.data,      sum.data,     mean.as<float>(), rstd.as<float>()};
  place.cuda() ? cuda::norm_forward(args, place.work()) : pyllm::norm_forward(args);
}

void norm_backward(const TensorView& dy, const TensorView& dsum, const TensorView& h, const TensorView& weight,
                   const TensorView& mean, const TensorView& rstd, const TensorView& dh, const TensorView& dweight,
                   const TensorView& dbias, bool centred) {
  const char* op = centred ? "layer_norm backward" : "rms_norm backward";
  const Place place(op, "h", h);
  check_float(op, "h", h);
  check_ndim(op, "h", h, 2);
  check_inner_stride(op, "h", h);
  check_rows(op, "dy", dy, h);
  if (dsum.present()) check_rows(op, "dsum", dsum, h);
  if (weight.present()) check_parameter(op, "weight", weight, h);
  if (centred) check_statistic(op, "mean", mean, h);
  check_statistic(op, "rstd", rstd, h);
  if (dh.present()) check_output(op, "dh", dh, h);
  for (const TensorView* d : {&dweight, &dbias}) {
    if (!d->present()) continue;
    check_parameter(op, d == &dweight ? "dweight" : "dbias", *d, h);
    check_dtype(op, d == &dweight ? "dweight" : "dbias", *d, weight.dtype);
    check_writable(op, d == &dweight ? "dweight" : "dbias", *d);
  }
  place.prefer_large_pages(dh);
  const NormBackwardArgs args{centred,
                              h.size(0),
                              h.size(1),
                              h.dtype,
                              weight.dtype,
                              dy.data,
                              dsum.data,
                              h.data,
                              weight.data,
                              dy.step(0),
                              dsum.present() ? dsum.step(0) : 0,
                              h.step(0),
                              mean.as<float>(),
                              rstd.as<float>(),
                              dh.data,
                              dweight.data,
                              dbias.data};
  place.cuda() ? cuda::norm_backward(args, place.work()) : pyllm::norm_backward(args);
}

}  // namespace pyllm::ops

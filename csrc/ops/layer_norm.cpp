#include "cpu/layer_norm.h"

#include "cuda/layer_norm.h"
#include "ops/ops.h"
#include "ops/place.h"

namespace pyllm::ops {

namespace {

// `x`, whose shape and dtype the other tensors have.
void check_input(const char* op, const char* name, const TensorView& x) {
  check_float(op, name, x);
  check(x.ndim >= 1, "[", op, "] ", name, " must have at least 1 dimension, but got a scalar");
  check_inner_stride(op, name, x);
}

void check_like(const char* op, const char* name, const TensorView& t, const TensorView& x) {
  check_dtype(op, name, t, x.dtype);
  check_shape_of(op, name, t, x);
  check_inner_stride(op, name, t);
}

void check_output(const char* op, const char* name, const TensorView& t, const TensorView& x) {
  check_like(op, name, t, x);
  check_contiguous(op, name, t);
  check_writable(op, name, t);
}

void check_parameter(const char* op, const char* name, const TensorView& t, const TensorView& x) {
  check_float(op, name, t);
  check_shape(op, name, t, x.size(-1));
  check_contiguous(op, name, t);
}

// A row's statistics are the reciprocal of its deviation and, where it is centred, its mean.
void check_statistics(const char* op, const TensorView& t, int64_t rows, bool centred) {
  check_dtype(op, "statistics", t, DType::f32);
  check_shape(op, "statistics", t, centred ? 2 : 1, rows);
  check_contiguous(op, "statistics", t);
}

float* mean_of(const TensorView& statistics, int64_t rows, bool centred) {
  return statistics.present() && centred ? statistics.as<float>() + rows : nullptr;
}

Rows rows_of(const TensorView& t) { return t.present() ? t.rows() : Rows(); }

}  // namespace

void norm_forward(const TensorView& x, const TensorView& residual, const TensorView& weight, const TensorView& bias,
                  const TensorView& y, const TensorView& sum, const TensorView& statistics, bool centred, double eps) {
  const char* op = centred ? "layer_norm" : "rms_norm";
  const Place place(op, "x", x);
  check_input(op, "x", x);
  const Rows rows = x.rows();
  if (residual.present()) {
    check_like(op, "residual", residual, x);
    check_output(op, "sum", sum, x);
  }
  if (weight.present()) check_parameter(op, "weight", weight, x);
  if (bias.present()) check_parameter(op, "bias", bias, x);
  if (bias.present()) check(weight.present(), "[", op, "] bias needs a weight");
  if (bias.present()) check_dtype(op, "bias", bias, weight.dtype);
  check_output(op, "y", y, x);
  if (statistics.present()) {
    check_statistics(op, statistics, rows.count, centred);
    check_writable(op, "statistics", statistics);
  }
  check(eps >= 0, "[", op, "] eps must be 0 or more, but got ", eps);
  place.prefer_large_pages(y);
  place.prefer_large_pages(sum);
  const NormArgs args{centred,
                      x.size(-1),
                      static_cast<float>(eps),
                      x.dtype,
                      weight.dtype,
                      x.data,
                      residual.data,
                      weight.data,
                      bias.data,
                      rows,
                      rows_of(residual),
                      y.data,
                      sum.data,
                      mean_of(statistics, rows.count, centred),
                      statistics.as<float>()};
  place.cuda() ? cuda::norm_forward(args, place.work()) : pyllm::norm_forward(args);
}

void norm_backward(const TensorView& dy, const TensorView& dsum, const TensorView& h, const TensorView& weight,
                   const TensorView& statistics, const TensorView& dh, const TensorView& dweight,
                   const TensorView& dbias, bool centred) {
  const char* op = centred ? "layer_norm backward" : "rms_norm backward";
  const Place place(op, "h", h);
  check_input(op, "h", h);
  const Rows rows = h.rows();
  check_like(op, "dy", dy, h);
  if (dsum.present()) check_like(op, "dsum", dsum, h);
  if (weight.present()) check_parameter(op, "weight", weight, h);
  check_statistics(op, statistics, rows.count, centred);
  if (dh.present()) check_output(op, "dh", dh, h);
  for (const TensorView* d : {&dweight, &dbias}) {
    if (!d->present()) continue;
    check_parameter(op, d == &dweight ? "dweight" : "dbias", *d, h);
    check_dtype(op, d == &dweight ? "dweight" : "dbias", *d, weight.dtype);
    check_writable(op, d == &dweight ? "dweight" : "dbias", *d);
  }
  place.prefer_large_pages(dh);
  const NormBackwardArgs args{centred,
                              h.size(-1),
                              h.dtype,
                              weight.dtype,
                              dy.data,
                              dsum.data,
                              h.data,
                              weight.data,
                              dy.rows(),
                              rows_of(dsum),
                              rows,
                              mean_of(statistics, rows.count, centred),
                              statistics.as<float>(),
                              dh.data,
                              dweight.data,
                              dbias.data};
  place.cuda() ? cuda::norm_backward(args, place.work()) : pyllm::norm_backward(args);
}

}  // namespace pyllm::ops

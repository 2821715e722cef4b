#include "cpu/cross_entropy.h"

#include "cpu/pages.h"
#include "cuda/cross_entropy.h"
#include "ops/ops.h"
#include "ops/place.h"

namespace pyllm::ops {

namespace {

Reduction reduction_of(const char* op, const std::string& name) {
  if (name == "mean") return Reduction::mean;
  if (name == "sum") return Reduction::sum;
  if (name == "none") return Reduction::none;
  fail(Error::value, "[", op, "] reduction must be 'mean', 'sum' or 'none', but got '", name, "'");
}

// targets has the leading dimensions of x.
void check_targets(const char* op, const TensorView& targets, const TensorView& x, int64_t classes,
                   int64_t ignore_index) {
  TensorView rows = x;
  rows.ndim--;
  bool same = targets.ndim == rows.ndim;
  for (int i = 0; same && i < rows.ndim; i++) same = targets.shape[i] == rows.shape[i];
  check(same, "[", op, "] targets must have shape ", rows.shape_text(), ", but got ", targets.shape_text());
  check_ids(op, "targets", targets, classes, ignore_index);
}

void check_logits(const char* op, const TensorView& logits) {
  check_float(op, "logits", logits);
  check(logits.ndim >= 1 && logits.size(-1) >= 1, "[", op,
        "] logits must have shape (..., V) with V at least 1, but got ", logits.shape_text());
  check_inner_stride(op, "logits", logits);
}

void check_floats(const char* op, const char* name, const TensorView& t, int64_t count) {
  check_dtype(op, name, t, DType::f32);
  check(t.numel() == count, "[", op, "] ", name, " must have ", count, " elements, but got shape ", t.shape_text());
  check_contiguous(op, name, t);
}

Loss loss_for(const char* op, const TensorView& targets, const TensorView& x, int64_t classes, int64_t ignore_index,
              double label_smoothing, const std::string& reduction) {
  check_targets(op, targets, x, classes, ignore_index);
  check(label_smoothing >= 0 && label_smoothing <= 1, "[", op, "] label_smoothing must be in [0, 1], but got ",
        label_smoothing);
  return {
      {targets.data, targets.dtype, ignore_index}, static_cast<float>(label_smoothing), reduction_of(op, reduction)};
}

void check_results(const char* op, const Loss& loss, const TensorView& losses, const TensorView& total, int64_t rows) {
  if (losses.present()) check_floats(op, "losses", losses, rows);
  if (loss.reduction != Reduction::none) check_floats(op, "total", total, 1);
}

void check_gradient(const char* op, const char* name, const TensorView& t, DType dtype, int64_t count) {
  check_dtype(op, name, t, dtype);
  check(t.numel() == count, "[", op, "] ", name, " must have ", count, " elements, but got shape ", t.shape_text());
  check_contiguous(op, name, t);
  check_writable(op, name, t);
}

}  // namespace

void cross_entropy_forward(const TensorView& logits, const TensorView& targets, const TensorView& losses,
                           const TensorView& statistics, const TensorView& total, int64_t ignore_index,
                           double label_smoothing, const std::string& reduction) {
  const char* op = "cross_entropy";
  const Place place(op, "logits", logits);
  check_logits(op, logits);
  const Loss loss = loss_for(op, targets, logits, logits.size(-1), ignore_index, label_smoothing, reduction);
  const Rows rows = logits.rows();
  check_results(op, loss, losses, total, rows.count);
  if (statistics.present()) check_floats(op, "statistics", statistics, 2 * rows.count);
  const CrossEntropyArgs args{rows, logits.size(-1),    logits.dtype,           logits.data,
                              loss, losses.as<float>(), statistics.as<float>(), total.as<float>()};
  place.cuda() ? cuda::cross_entropy_forward(args, place.work()) : pyllm::cross_entropy_forward(args);
}

void cross_entropy_backward(const TensorView& logits, const TensorView& targets, const TensorView& statistics,
                            const TensorView& dloss, const TensorView& dlogits, int64_t ignore_index,
                            double label_smoothing, const std::string& reduction) {
  const char* op = "cross_entropy backward";
  const Place place(op, "logits", logits);
  check_logits(op, logits);
  const Loss loss = loss_for(op, targets, logits, logits.size(-1), ignore_index, label_smoothing, reduction);
  const Rows rows = logits.rows();
  check_floats(op, "statistics", statistics, 2 * rows.count);
  check_floats(op, "dloss", dloss, loss.reduction == Reduction::none ? rows.count : 1);
  check_gradient(op, "dlogits", dlogits, logits.dtype, logits.numel());
  place.prefer_large_pages(dlogits);
  const CrossEntropyBackwardArgs args{rows, logits.size(-1),        logits.dtype,      logits.data,
                                      loss, statistics.as<float>(), dloss.as<float>(), dlogits.data};
  place.cuda() ? cuda::cross_entropy_backward(args, place.work()) : pyllm::cross_entropy_backward(args);
}

void linear_cross_entropy(const TensorView& x, const TensorView& weight, const TensorView& bias,
                          const TensorView& targets, const TensorView& block, const TensorView& losses,
                          const TensorView& total, const TensorView& dloss, const TensorView& dx,
                          const TensorView& dweight, const TensorView& dbias, int64_t ignore_index,
                          double label_smoothing, const std::string& reduction) {
  const char* op = "linear_cross_entropy";
  check_float(op, "x", x);
  check(x.ndim >= 1, "[", op, "] x must have shape (..., K), but got a scalar");
  check_dtype(op, "weight", weight, x.dtype);
  check_ndim(op, "weight", weight, 2);
  check_shape(op, "weight", weight, weight.size(0), x.size(-1));
  const int64_t classes = weight.size(0), width = weight.size(1);
  check(classes >= 1, "[", op, "] weight must have at least 1 row, but got shape ", weight.shape_text());
  if (bias.present()) {
    check_dtype(op, "bias", bias, x.dtype);
    check_shape(op, "bias", bias, classes);
    check_contiguous(op, "bias", bias);
  }
  const Loss loss = loss_for(op, targets, x, classes, ignore_index, label_smoothing, reduction);
  const Rows rows = x.rows();
  check(rows.levels <= 1, "[", op, "] the rows of x must be the same number of elements apart, but got shape ",
        x.shape_text());
  check_results(op, loss, losses, total, rows.count);
  if (dloss.present()) check_floats(op, "dloss", dloss, loss.reduction == Reduction::none ? rows.count : 1);
  check_dtype(op, "block", block, DType::f32);
  check_ndim(op, "block", block, 2);
  check_contiguous(op, "block", block);
  if (dx.present()) check_gradient(op, "dx", dx, x.dtype, x.numel());
  if (dweight.present()) {
    const bool narrow = dweight.dtype == x.dtype && block.size(0) >= rows.count;
    check_gradient(op, "dweight", dweight, narrow ? x.dtype : DType::f32, classes * width);
  }
  if (dbias.present()) check_gradient(op, "dbias", dbias, DType::f32, classes);
  const bool gradients = dx.present() || dweight.present() || dbias.present();
  check(block.size(0) >= 1 &&
            (block.size(1) == classes || (!gradients && block.size(1) > 0 && block.size(1) % 4096 == 0)),
        "[", op, "] block must have ", classes, " columns, or without gradients a multiple of 4096, but got shape ",
        block.shape_text());
  cpu::prefer_large_pages(block.data, block.numel() * size_of(block.dtype));
  if (dweight.present()) cpu::prefer_large_pages(dweight.data, dweight.numel() * size_of(dweight.dtype));
  pyllm::linear_cross_entropy({rows.count,        width,
                               classes,           block.size(0),
                               block.size(1),     x.data,
                               weight.data,       bias.data,
                               x.dtype,           rows.levels ? rows.step[0] : 0,
                               x.step(-1),        weight.step(0),
                               weight.step(1),    loss,
                               block.as<float>(), losses.as<float>(),
                               total.as<float>(), dloss.as<float>(),
                               dx.data,           dweight.data,
                               dweight.dtype,     dbias.as<float>()});
}

}  // namespace pyllm::ops

#include "cpu/route.h"

#include "ops/ops.h"

namespace pyllm::ops {

void route(const TensorView& logits, const TensorView& weights, const TensorView& order, const TensorView& places,
           const TensorView& offsets, int64_t active, bool normalised) {
  const char* op = "route";
  check_float(op, "logits", logits);
  check_ndim(op, "logits", logits, 2);
  check_inner_stride(op, "logits", logits);
  const int64_t rows = logits.size(0), experts = logits.size(1);
  check(active >= 1 && active <= experts, "[route] active must be from 1 to ", experts,
        ", the number of experts, but got ", active);
  check_dtype(op, "weights", weights, DType::f32);
  check_shape(op, "weights", weights, rows, active);
  for (const TensorView* t : {&order, &places}) {
    check_dtype(op, t == &order ? "order" : "places", *t, DType::i64);
    check_shape(op, t == &order ? "order" : "places", *t, rows * active);
  }
  check_dtype(op, "offsets", offsets, DType::i64);
  check_shape(op, "offsets", offsets, experts + 1);
  for (const TensorView* t : {&weights, &order, &places, &offsets}) {
    check_contiguous(op, "what is written", *t);
    check_writable(op, "what is written", *t);
  }
  pyllm::route({rows, experts, active, normalised, logits.dtype, logits.data, logits.step(0), weights.as<float>(),
                order.as<int64_t>(), places.as<int64_t>(), offsets.as<int64_t>()});
}

void route_backward(const TensorView& logits, const TensorView& weights, const TensorView& dweights,
                    const TensorView& places, const TensorView& offsets, const TensorView& dlogits, bool normalised) {
  const char* op = "route backward";
  check_float(op, "logits", logits);
  check_ndim(op, "logits", logits, 2);
  check_inner_stride(op, "logits", logits);
  check_dtype(op, "weights", weights, DType::f32);
  check_ndim(op, "weights", weights, 2);
  const int64_t rows = logits.size(0), experts = logits.size(1), active = weights.size(1);
  check_shape(op, "weights", weights, rows, active);
  check_dtype(op, "dweights", dweights, DType::f32);
  check_shape(op, "dweights", dweights, rows, active);
  check_dtype(op, "places", places, DType::i64);
  check_shape(op, "places", places, rows * active);
  check_dtype(op, "offsets", offsets, DType::i64);
  check_shape(op, "offsets", offsets, experts + 1);
  check_dtype(op, "dlogits", dlogits, logits.dtype);
  check_shape(op, "dlogits", dlogits, rows, experts);
  for (const TensorView* t : {&weights, &dweights, &places, &offsets, &dlogits})
    check_contiguous(op, t == &dlogits ? "dlogits" : "what the forward pass gave", *t);
  check_writable(op, "dlogits", dlogits);
  pyllm::route_backward({rows, experts, active, normalised, logits.dtype, logits.data, logits.step(0),
                         weights.as<float>(), dweights.as<float>(), places.as<int64_t>(), offsets.as<int64_t>(),
                         dlogits.data});
}

}  // namespace pyllm::ops

#include "cpu/embedding.h"

#include "cuda/embedding.h"
#include "ops/ops.h"
#include "ops/place.h"

namespace pyllm::ops {

void embedding_forward(const TensorView& ids, const TensorView& weight, const TensorView& out) {
  const char* op = "embedding";
  const Place place(op, "weight", weight);
  check_float(op, "weight", weight);
  check_ndim(op, "weight", weight, 2);
  check_inner_stride(op, "weight", weight);
  check_ids(op, "ids", ids, weight.size(0));
  check_dtype(op, "out", out, weight.dtype);
  check(out.numel() == ids.numel() * weight.size(1), "[", op,
        "] out must have a row of weight for each id, but got shape ", out.shape_text());
  check_contiguous(op, "out", out);
  check_writable(op, "out", out);
  place.prefer_large_pages(out);
  const EmbeddingArgs args{ids.numel(),  weight.size(1), weight.step(0), weight.size(0), ids.dtype,
                           weight.dtype, ids.data,       weight.data,    out.data};
  place.cuda() ? cuda::embedding_forward(args, place.work()) : pyllm::embedding_forward(args);
}

void embedding_backward(const TensorView& ids, const TensorView& dy, const TensorView& dweight, bool zeroed) {
  const char* op = "embedding backward";
  const Place place(op, "dweight", dweight);
  check_float(op, "dweight", dweight);
  check_ndim(op, "dweight", dweight, 2);
  check_contiguous(op, "dweight", dweight);
  check_writable(op, "dweight", dweight);
  check_ids(op, "ids", ids, dweight.size(0));
  check_dtype(op, "dy", dy, dweight.dtype);
  check_shape(op, "dy", dy, ids.numel(), dweight.size(1));
  check_inner_stride(op, "dy", dy);
  if (!zeroed) place.prefer_large_pages(dweight);
  const EmbeddingBackwardArgs args{ids.numel(),   dweight.size(1), dweight.size(0), dy.step(0), ids.dtype,
                                   dweight.dtype, zeroed,          ids.data,        dy.data,    dweight.data};
  place.cuda() ? cuda::embedding_backward(args, place.work()) : pyllm::embedding_backward(args);
}

}  // namespace pyllm::ops

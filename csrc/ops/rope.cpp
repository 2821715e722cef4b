#include "cpu/rope.h"

#include "cuda/rope.h"
#include "ops/ops.h"
#include "ops/place.h"

namespace pyllm::ops {

void rope(const TensorView& x, const TensorView& positions, const TensorView& inv_freq, const TensorView& out,
          int64_t rotary_dim, bool interleaved, double scale, bool inverse) {
  const char* op = "rope";
  const Place place(op, "x", x);
  check_float(op, "x", x);
  check_ndim(op, "x", x, 4);
  check_inner_stride(op, "x", x);
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(3);
  check(rotary_dim >= 0 && rotary_dim <= width && rotary_dim % 2 == 0, "[", op, "] rotary_dim must be even and in [0, ",
        width, "], but got ", rotary_dim);
  check_device(op, "positions", positions);
  if (positions.dtype != DType::i64 && positions.dtype != DType::i32)
    fail(Error::type, "[", op, "] positions must be int64 or int32, but got ", name_of(positions.dtype));
  const bool shared = positions.ndim == 1;
  if (shared)
    check_shape(op, "positions", positions, length);
  else
    check_shape(op, "positions", positions, batch, length);
  check_contiguous(op, "positions", positions);
  check_dtype(op, "inv_freq", inv_freq, DType::f32);
  check_shape(op, "inv_freq", inv_freq, rotary_dim / 2);
  check_contiguous(op, "inv_freq", inv_freq);
  check_dtype(op, "out", out, x.dtype);
  check_shape(op, "out", out, batch, length, x.size(2), width);
  check_contiguous(op, "out", out);
  check_writable(op, "out", out);
  place.prefer_large_pages(out);
  const RopeArgs args{batch,
                      length,
                      x.size(2),
                      width,
                      rotary_dim,
                      interleaved,
                      inverse,
                      x.dtype,
                      positions.dtype,
                      x.data,
                      positions.data,
                      x.step(0),
                      x.step(1),
                      x.step(2),
                      shared,
                      inv_freq.as<float>(),
                      static_cast<float>(scale),
                      out.data};
  place.cuda() ? cuda::rope(args, place.work()) : pyllm::rope(args);
}

}  // namespace pyllm::ops

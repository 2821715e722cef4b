#include "cpu/checksum.h"

#include "ops/ops.h"

namespace pyllm::ops {

void checksum(const TensorView& data, const TensorView& sums) {
  const char* op = "checksum";
  check_dtype(op, "data", data, DType::u8);
  check_ndim(op, "data", data, 1);
  check_contiguous(op, "data", data);
  check_dtype(op, "sums", sums, DType::i32);
  check_shape(op, "sums", sums, (data.numel() + kChecksumBlock - 1) / kChecksumBlock, kChecksumLanes);
  check_contiguous(op, "sums", sums);
  check_writable(op, "sums", sums);
  pyllm::checksum({data.as<uint8_t>(), data.numel(), sums.as<uint32_t>()});
}

}  // namespace pyllm::ops

#include "cpu/ceilings.h"

#include "ops/ops.h"

namespace pyllm::ops {

int64_t multiply_add(int64_t rounds) {
  int64_t flops = 0;
  pyllm::multiply_add({rounds, &flops});
  return flops;
}

void read(const TensorView& data) {
  check_dtype("read", "data", data, DType::f32);
  check_contiguous("read", "data", data);
  pyllm::read({data.as<float>(), data.numel()});
}

}  // namespace pyllm::ops

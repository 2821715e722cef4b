// A quantised weight in panels, as an op's argument.
#pragma once
#include "args/quantized_linear.h"
#include "tensor.h"

namespace pyllm::ops {

// The weight (n x k) that panels hold, packed for CUDA or the CPU.
QuantizedWeight packed_weight(const char* op, const char* name, bool on_cuda, const TensorView& panels, int64_t n,
                              int64_t k, int64_t bits, int64_t group, bool half_scales, bool has_minimums);

}  // namespace pyllm::ops

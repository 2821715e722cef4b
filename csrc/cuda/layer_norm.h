#pragma once
#include "args/layer_norm.h"
#include "cuda/device.h"

namespace pyllm {

PYLLM_CUDA_KERNEL(norm_forward, NormArgs)
PYLLM_CUDA_KERNEL(norm_backward, NormBackwardArgs)

}  // namespace pyllm

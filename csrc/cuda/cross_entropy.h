#pragma once
#include "args/cross_entropy.h"
#include "cuda/device.h"

namespace pyllm {

PYLLM_CUDA_KERNEL(cross_entropy_forward, CrossEntropyArgs)
PYLLM_CUDA_KERNEL(cross_entropy_backward, CrossEntropyBackwardArgs)

}  // namespace pyllm

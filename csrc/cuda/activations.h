#pragma once
#include "args/activations.h"
#include "cuda/device.h"

namespace pyllm {

PYLLM_CUDA_KERNEL(activation_forward, ActivationArgs)
PYLLM_CUDA_KERNEL(activation_backward, ActivationBackwardArgs)

}  // namespace pyllm

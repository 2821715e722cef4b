#pragma once
#include "args/recurrent.h"
#include "cuda/device.h"

namespace pyllm {

PYLLM_CUDA_KERNEL(recurrent_steps, RecurrentStepsArgs)
PYLLM_CUDA_KERNEL(recurrent_steps_backward, RecurrentStepsBackwardArgs)

}  // namespace pyllm

#pragma once
#include "args/rope.h"
#include "cuda/device.h"

namespace pyllm {

PYLLM_CUDA_KERNEL(rope, RopeArgs)

}  // namespace pyllm

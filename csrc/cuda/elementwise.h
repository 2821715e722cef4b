#pragma once
#include "args/elementwise.h"
#include "cuda/device.h"

namespace pyllm {

PYLLM_CUDA_KERNEL(elementwise, ElementwiseArgs)

}  // namespace pyllm

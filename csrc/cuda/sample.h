#pragma once
#include "args/sample.h"
#include "cuda/device.h"

namespace pyllm {

PYLLM_CUDA_KERNEL(sample, SampleArgs)

}  // namespace pyllm

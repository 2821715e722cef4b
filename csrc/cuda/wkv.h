#pragma once
#include "args/wkv.h"
#include "cuda/device.h"

namespace pyllm {

PYLLM_CUDA_KERNEL(wkv_forward, WkvArgs)
PYLLM_CUDA_KERNEL(wkv_backward, WkvBackwardArgs)

}  // namespace pyllm

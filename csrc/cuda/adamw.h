#pragma once
#include "args/adamw.h"
#include "cuda/device.h"

namespace pyllm {

PYLLM_CUDA_KERNEL(adamw, AdamwArgs)

}  // namespace pyllm

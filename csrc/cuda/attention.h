#pragma once
#include "args/attention.h"
#include "cuda/device.h"

namespace pyllm {

PYLLM_CUDA_KERNEL(attention_forward, AttentionForwardArgs)
PYLLM_CUDA_KERNEL(attention_backward, AttentionBackwardArgs)

}  // namespace pyllm

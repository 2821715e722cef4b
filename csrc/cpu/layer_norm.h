#pragma once
#include "args/layer_norm.h"
#include "cpu/dispatch.h"

namespace pyllm {

PYLLM_KERNEL(norm_forward, NormArgs)
PYLLM_KERNEL(norm_backward, NormBackwardArgs)

}  // namespace pyllm

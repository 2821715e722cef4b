#pragma once
#include "args/cross_entropy.h"
#include "cpu/dispatch.h"

namespace pyllm {

PYLLM_KERNEL(cross_entropy_forward, CrossEntropyArgs)
PYLLM_KERNEL(cross_entropy_backward, CrossEntropyBackwardArgs)
PYLLM_KERNEL(linear_cross_entropy, LinearCrossEntropyArgs)

}  // namespace pyllm

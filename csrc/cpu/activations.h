#pragma once
#include "args/activations.h"
#include "cpu/dispatch.h"

namespace pyllm {

PYLLM_KERNEL(activation_forward, ActivationArgs)
PYLLM_KERNEL(activation_backward, ActivationBackwardArgs)

}  // namespace pyllm

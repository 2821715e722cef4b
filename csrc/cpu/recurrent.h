#pragma once
#include "args/recurrent.h"
#include "cpu/dispatch.h"

namespace pyllm {

PYLLM_KERNEL(recurrent_forward, RecurrentArgs)
PYLLM_KERNEL(recurrent_backward, RecurrentBackwardArgs)

}  // namespace pyllm

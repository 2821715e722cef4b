#pragma once
#include "args/attention.h"
#include "cpu/dispatch.h"

namespace pyllm {

PYLLM_KERNEL(attention_forward, AttentionForwardArgs)
PYLLM_KERNEL(attention_backward, AttentionBackwardArgs)

}  // namespace pyllm

#pragma once
#include "args/wkv.h"
#include "cpu/dispatch.h"

namespace pyllm {

PYLLM_KERNEL(wkv_forward, WkvArgs)
PYLLM_KERNEL(wkv_backward, WkvBackwardArgs)

}  // namespace pyllm

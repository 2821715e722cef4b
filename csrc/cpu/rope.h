#pragma once
#include "args/rope.h"
#include "cpu/dispatch.h"

namespace pyllm {

PYLLM_KERNEL(rope, RopeArgs)

}  // namespace pyllm

#pragma once
#include "args/elementwise.h"
#include "cpu/dispatch.h"

namespace pyllm {

PYLLM_KERNEL(elementwise, ElementwiseArgs)

}  // namespace pyllm

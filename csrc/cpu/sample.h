#pragma once
#include "args/sample.h"
#include "cpu/dispatch.h"

namespace pyllm {

PYLLM_KERNEL(sample, SampleArgs)

}  // namespace pyllm

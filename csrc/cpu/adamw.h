#pragma once
#include "args/adamw.h"
#include "cpu/dispatch.h"

namespace pyllm {

PYLLM_KERNEL(adamw, AdamwArgs)

}  // namespace pyllm

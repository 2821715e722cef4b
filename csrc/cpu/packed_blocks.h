#pragma once
#include "args/packed_blocks.h"
#include "cpu/dispatch.h"

namespace pyllm {

PYLLM_KERNEL(unpack_blocks, UnpackBlocksArgs)

}  // namespace pyllm

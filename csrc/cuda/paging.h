#pragma once
#include "args/paging.h"
#include "cuda/device.h"

namespace pyllm {

PYLLM_CUDA_KERNEL(write_pages, WritePagesArgs)
PYLLM_CUDA_KERNEL(next_positions, NextPositionsArgs)

}  // namespace pyllm

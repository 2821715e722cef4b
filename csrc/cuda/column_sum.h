#pragma once
#include "args/column_sum.h"
#include "cuda/device.h"

namespace pyllm {

PYLLM_CUDA_KERNEL(column_sum, ColumnSumArgs)

}  // namespace pyllm

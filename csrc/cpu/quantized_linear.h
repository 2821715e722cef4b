#pragma once
#include "args/quantized_linear.h"
#include "cpu/dispatch.h"

namespace pyllm {

PYLLM_KERNEL(quantized_linear, QuantizedLinearArgs)
PYLLM_KERNEL(quantized_linear_backward, QuantizedLinearBackwardArgs)
PYLLM_KERNEL(quantized_embedding, QuantizedEmbeddingArgs)
PYLLM_KERNEL(pack_quantized, PackQuantizedArgs)
PYLLM_KERNEL(check_units, CheckUnitsArgs)

}  // namespace pyllm

#pragma once
#include "args/quantized_linear.h"
#include "cuda/device.h"

namespace pyllm {

namespace cuda {
constexpr int64_t kQuantizedPanel = 8;  // rows of a panel, whose memory begins at a multiple of 16 bytes
}
PYLLM_CUDA_KERNEL(quantized_linear, QuantizedLinearArgs)
PYLLM_CUDA_KERNEL(quantized_linear_backward, QuantizedLinearBackwardArgs)
PYLLM_CUDA_KERNEL(quantized_embedding, QuantizedEmbeddingArgs)

}  // namespace pyllm

#pragma once
#include "args/embedding.h"
#include "cuda/device.h"

namespace pyllm {

PYLLM_CUDA_KERNEL(embedding_forward, EmbeddingArgs)
PYLLM_CUDA_KERNEL(embedding_backward, EmbeddingBackwardArgs)

}  // namespace pyllm

#pragma once
#include "args/embedding.h"
#include "cpu/dispatch.h"

namespace pyllm {

PYLLM_KERNEL(embedding_forward, EmbeddingArgs)
PYLLM_KERNEL(embedding_backward, EmbeddingBackwardArgs)

}  // namespace pyllm

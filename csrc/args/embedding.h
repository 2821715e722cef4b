#pragma once
#include <cstdint>

#include "dtype.h"

namespace pyllm {

// out (count x width, contiguous): row i is row ids[i] of weight, whose rows are weight_step elements apart.
struct EmbeddingArgs {
  int64_t count, width, weight_step, vocabulary;
  DType ids_dtype, dtype;
  const char *ids, *weight;
  char* out;
};

// dweight (vocabulary x width, contiguous): row v is the sum of the rows i of dy with ids[i] == v.
struct EmbeddingBackwardArgs {
  int64_t count, width, vocabulary, dy_step;
  DType ids_dtype, dtype;
  bool zeroed;  // dweight holds zeros already
  const char *ids, *dy;
  char* dweight;
};

}  // namespace pyllm

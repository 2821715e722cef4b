#pragma once
#include <cstdint>

#include "dtype.h"

namespace pyllm {

// `count` elements, contiguous each. Moments are float, or of the parameter's dtype.
struct AdamwTensor {
  char* parameter;
  const char* gradient;
  char *first, *second;
  int64_t count;
};

// One step of AdamW: with g the gradient times `scale`,
//   first += (g - first) * rate1,  second = second * beta2 + g * g * rate2
//   parameter = parameter * kept - first / (sqrt(second) * root + eps) * rate
struct AdamwSettings {
  float beta2, rate1, rate2, root, eps, kept, rate, scale;
  const float* scale_at;  // where the scale is, or null
};

struct AdamwArgs {
  const AdamwTensor* tensors;  // of one pair of dtypes
  int64_t tensor_count;
  DType dtype, moment_dtype;
  AdamwSettings settings;
};

}  // namespace pyllm

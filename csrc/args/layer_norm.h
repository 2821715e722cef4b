#pragma once
#include <cstdint>

#include "dtype.h"

namespace pyllm {

// Rows of `cols` elements, row i of x at x + i * x_stride elements (likewise residual); every output is contiguous.
struct NormArgs {
  bool centred;  // layer norm; rms norm does not subtract the mean
  int64_t rows, cols;
  float eps;
  DType dtype, weight_dtype;
  const char *x, *residual, *weight, *bias;  // the last three may be null
  int64_t x_stride, residual_stride;
  char *y, *sum;       // sum = x + residual, where there is a residual
  float *mean, *rstd;  // for the backward pass, or null
};

struct NormBackwardArgs {
  bool centred;
  int64_t rows, cols;
  DType dtype, weight_dtype;
  const char *dy, *dsum, *h, *weight;  // h: what was normalised; dsum: gradient reaching h beside y's, or null
  int64_t dy_stride, dsum_stride, h_stride;
  const float *mean, *rstd;
  char *dh, *dweight, *dbias;  // each may be null
};

}  // namespace pyllm

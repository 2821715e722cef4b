#pragma once
#include <cstdint>

#include "dtype.h"
#include "rows.h"

namespace pyllm {

// Rows of `cols` elements, those of the inputs where their `Rows` say; every output is contiguous.
struct NormArgs {
  bool centred;  // layer norm; rms norm does not subtract the mean
  int64_t cols;
  float eps;
  DType dtype, weight_dtype;
  const char *x, *residual, *weight, *bias;  // the last three may be null
  Rows x_rows, residual_rows;
  char *y, *sum;       // sum = x + residual, where there is a residual
  float *mean, *rstd;  // for the backward pass, or null
};

struct NormBackwardArgs {
  bool centred;
  int64_t cols;
  DType dtype, weight_dtype;
  const char *dy, *dsum, *h, *weight;  // h: what was normalised; dsum: gradient reaching h beside y's, or null
  Rows dy_rows, dsum_rows, h_rows;
  const float *mean, *rstd;
  char *dh, *dweight, *dbias;  // each may be null
};

}  // namespace pyllm

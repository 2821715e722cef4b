#pragma once
#include "cpu/dispatch.h"
#include "dtype.h"

namespace pyllm {

// c (m x n, contiguous) = a (m x k) b (k x n) + bias (n, or null); a and b of any strides, in elements.
struct MatmulArgs {
  int64_t m, n, k;
  const char *a, *b, *bias;
  char* c;
  DType a_dtype, b_dtype, bias_dtype, c_dtype;
  int64_t a_row, a_column, b_row, b_column;
};

// sums (n, contiguous) = a (m x n) summed over its rows.
struct ColumnSumArgs {
  int64_t m, n;
  const char* a;
  char* sums;
  DType dtype, sums_dtype;
  int64_t a_row;
};

PYLLM_KERNEL(matmul, MatmulArgs)
PYLLM_KERNEL(column_sum, ColumnSumArgs)

}  // namespace pyllm

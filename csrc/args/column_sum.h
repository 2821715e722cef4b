#pragma once
#include <cstdint>

#include "dtype.h"

namespace pyllm {

// sums (n, contiguous) = a (m x n) summed over its rows.
struct ColumnSumArgs {
  int64_t m, n;
  const char* a;
  char* sums;
  DType dtype, sums_dtype;
  int64_t a_row;
};

}  // namespace pyllm

#pragma once
#include "args/column_sum.h"
#include "cpu/dispatch.h"
#include "dtype.h"

namespace pyllm {

// c (m x n, contiguous) = a (m x k) b (k x n) + bias (n, or null); a and b of any strides, in elements. With `packed`, b
// is what pack_weight made. A gradient's bits may depend on m and n.
struct MatmulArgs {
  int64_t m, n, k;
  const char *a, *b, *bias;
  char* c;
  DType a_dtype, b_dtype, bias_dtype, c_dtype;
  int64_t a_row, a_column, b_row, b_column;
  bool packed = false, gradient = false;
};

// panels, (n / panel_width() rounded up) x panel_rows() x panel_width(), of b (k x n, of any strides) and of its type.
struct PackWeightArgs {
  int64_t n, k;
  const char* b;
  char* panels;
  DType dtype;
  int64_t b_row, b_column;
};

// Columns of a panel: two vectors of the chosen instruction set.
inline int64_t panel_width() { return 8 << cpu::chosen_isa; }
// Rows of a panel: those of 16 bits lie by pairs, as many as fill tiles of 32.
inline int64_t panel_rows(int64_t k, DType dtype) { return dtype == DType::f32 ? k : (k + 31) / 32 * 32; }

PYLLM_KERNEL(matmul, MatmulArgs)
PYLLM_KERNEL(pack_weight, PackWeightArgs)
PYLLM_KERNEL(column_sum, ColumnSumArgs)

}  // namespace pyllm

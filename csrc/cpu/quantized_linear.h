#pragma once
#include "cpu/dispatch.h"
#include "dtype.h"

namespace pyllm {

// A weight (n x k) of small whole numbers, in groups of kGroup along k: an element is (value - 2^(bits - 1)) * scale, or
// value * scale + minimum. k is filled up to whole groups. In memory it is panels of panel_width() rows, a panel its
// groups one after another, and a group [values][scales][minimums], the values as the kernel reads them.
constexpr int64_t kGroup = 32;

struct QuantizedWeight {
  int64_t n, groups;
  int bits;           // 8 or 4
  DType scale_dtype;  // f16 or f32
  bool has_minimums;
  int64_t group_bytes(int64_t width) const {
    return width * (kGroup * bits / 8 + size_of(scale_dtype) * (has_minimums ? 2 : 1));
  }
};

// c (m x n, contiguous) = a (m x k) times the weight's transpose, + bias (n, or null). A row of a is quantised to 8 bits
// in the same groups; their products are summed in whole numbers, and the groups in fp32, in order.
struct QuantizedLinearArgs {
  QuantizedWeight weight;
  int64_t m, k, a_row;
  const char *a, *panels, *bias;
  char* c;
  DType dtype;  // of a, bias and c
};

// values (n x groups * kGroup * bits / 8; of 4 bits, the first of two in the low half), scales and minimums (n x groups)
// to panels.
struct PackQuantizedArgs {
  QuantizedWeight weight;
  const uint8_t* values;
  const char *scales, *minimums;
  char* panels;
};

PYLLM_KERNEL(quantized_linear, QuantizedLinearArgs)
PYLLM_KERNEL(pack_quantized, PackQuantizedArgs)

}  // namespace pyllm

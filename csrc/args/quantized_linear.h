#pragma once
#include <cstdint>

#include "dtype.h"

namespace pyllm {

// A weight (n x k) of small whole numbers, in groups along k: an element is (value - 2^(bits - 1)) * scale, or
// value * scale + minimum. k is filled up to whole groups. In memory it is panels of rows (panel_width() of them for the
// CPU, 8 for CUDA), a panel its groups one after another, and a group [values][scales][minimums]. Values are quads of four
// neighbours' bytes, a quad of all rows after another; of 4 bits, a byte has an element of the group's first half in its
// low bits, and of the second in its high ones.
//
// `span` neighbouring groups, the last perhaps fewer, make up a larger group, within which a row of x has one scale (on CUDA
// it has one a group). Of 8 bits, all have the same scales. Of 4 bits, each group has its own, but scales and minimums are
// whole multiples of the span's unit, 1/64 of the largest power of two that its elements can reach: so elements are whole
// multiples, too, below 128 in size, and what a row's span adds is summed in whole numbers.
struct QuantizedWeight {
  int64_t n, groups, group;  // group: 32 elements or, of 8 bits, 16
  int64_t span;              // 1 or, in groups of 32 and not of 8 bits with minimums, 2, 4 or 8
  int bits;                  // 8 or 4
  DType scale_dtype;         // f16 or f32
  bool has_minimums;
  constexpr bool in_units() const { return bits == 4 && span > 1; }
  constexpr int zero() const { return has_minimums ? 0 : 1 << (bits - 1); }
  constexpr int64_t value_bytes() const { return group * bits / 8; }                   // of a row's group
  constexpr int64_t scale_bytes() const { return scale_dtype == DType::f16 ? 2 : 4; }  // without a table, for CUDA
  constexpr int64_t group_bytes(int64_t width) const {
    return width * (value_bytes() + scale_bytes() * (has_minimums ? 2 : 1));
  }
};

// c (m x n, contiguous) = a (m x k) times the weight's transpose, + bias (n, or null). A row of a is quantised to 8 bits
// in the same groups, or spans; their products are summed in whole numbers, and these in fp32, in order.
struct QuantizedLinearArgs {
  QuantizedWeight weight;
  int64_t m, k, a_row;
  const char *a, *panels, *bias;
  char* c;
  DType dtype;  // of a, bias and c
};

// dx (m x k, float) = dy (m x n) times the weight.
struct QuantizedLinearBackwardArgs {
  QuantizedWeight weight;
  int64_t m, k, dy_row;
  const char *dy, *panels;
  float* dx;
  DType dtype;  // of dy
};

// out (count x k, contiguous): row i is row ids[i] of the weight.
struct QuantizedEmbeddingArgs {
  QuantizedWeight weight;
  int64_t count, k;
  DType ids_dtype, dtype;
  const char *ids, *panels;
  char* out;
};

// values (n x groups * value_bytes(); of 4 bits, the first of two in the low half), scales and minimums (n x groups)
// to panels.
struct PackQuantizedArgs {
  QuantizedWeight weight;
  const uint8_t* values;
  const char *scales, *minimums;
  char* panels;
};

// Whether a weight that is in units has scales, and minimums, that are whole multiples of them.
struct CheckUnitsArgs {
  QuantizedWeight weight;
  const char* panels;
  bool* whole;
};

}  // namespace pyllm

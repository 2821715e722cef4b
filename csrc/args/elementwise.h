#pragma once
#include <cstdint>

#include "dtype.h"

namespace pyllm {

enum class Elementwise { copy, add, subtract, multiply, divide, relu, minimum, maximum };

constexpr int kElementwiseDims = 8;

// out = f(a) or f(a, b), element by element over `shape`; a step of 0 repeats. Floating point of any of the three dtypes
// each, computed in float32; or all three of one other dtype: int64 for arithmetic, any for a copy. Minimum and maximum
// are of int64 alone.
struct ElementwiseArgs {
  Elementwise kind;
  DType a_dtype, b_dtype, out_dtype;
  int ndim;  // dimension 0 is the outermost
  int64_t shape[kElementwiseDims], a_step[kElementwiseDims], b_step[kElementwiseDims], out_step[kElementwiseDims];
  const char *a, *b;
  char* out;
};

}  // namespace pyllm

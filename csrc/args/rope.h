#pragma once
#include <cstdint>

#include "dtype.h"

namespace pyllm {

// out (batch x length x heads x width, contiguous): the first `rotary` elements of each head of x turned by the angles
// position * inv_freq, a product of floats, the rest copied. Frequency i turns the pair (i, i + rotary / 2), or (2 i, 2 i + 1) if interleaved.
struct RopeArgs {
  int64_t batch, length, heads, width, rotary;
  bool interleaved, inverse;  // inverse: by the negative angles, as in backward
  DType dtype, positions_dtype;
  const char *x, *positions;
  int64_t x_batch, x_time, x_head;
  bool shared;            // positions are (length), the same for every sequence, not (batch x length)
  const float* inv_freq;  // rotary / 2
  float scale;
  char* out;
};

}  // namespace pyllm

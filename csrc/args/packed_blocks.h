#pragma once
#include <cstdint>

#include "dtype.h"

namespace pyllm {

enum class PackedBlocks : int { q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k };  // of GGML

struct PackedBlocksShape {
  int64_t values, bytes;  // of a block
  int64_t group;          // values that share a scale
  int bits;               // that hold a value: 8 or 4
  int zero;               // the whole number that stands for 0, where there are no minimums
  bool half_scales, has_minimums;
};

constexpr PackedBlocksShape kPackedBlocks[] = {
    {32, 18, 32, 4, 8, true, false},   {32, 20, 32, 4, 0, true, true},      {32, 22, 32, 8, 16, true, false},
    {32, 24, 32, 8, 0, true, true},    {32, 34, 32, 8, 128, true, false},   {256, 144, 32, 4, 0, false, true},
    {256, 176, 32, 8, 0, false, true}, {256, 210, 16, 8, 32, false, false},
};

// rows x blocks, contiguous, as values, scales and minimums (or null) of a `QuantizedWeight` of so many bits a value and
// values a group, which hold at least what the blocks do.
struct UnpackBlocksArgs {
  PackedBlocks kind;
  int64_t rows, blocks;
  const uint8_t* raw;
  int bits;
  int64_t group;
  DType scale_dtype;
  uint8_t* values;
  char *scales, *minimums;
  bool* finite;  // whether all scales and minimums are
};

}  // namespace pyllm

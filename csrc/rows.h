// Where row r of a tensor begins, for tensors whose leading dimensions have any strides.
#pragma once
#include <cstdint>

namespace pyllm {

struct Rows {
  int64_t count = 1;  // of rows
  int levels = 0;     // leading dimensions left after merging neighbours, innermost first
  int64_t size[7] = {}, step[7] = {};

  void add(int64_t n, int64_t stride) {  // dimensions are added from the innermost out
    count *= n;
    if (n == 1) return;
    if (levels > 0 && stride == step[levels - 1] * size[levels - 1]) {
      size[levels - 1] *= n;
      return;
    }
    size[levels] = n;
    step[levels++] = stride;
  }
  constexpr int64_t offset(int64_t row) const {
    if (levels == 1) return row * step[0];
    int64_t at = 0;
    for (int i = 0; i < levels; i++) {
      at += row % size[i] * step[i];
      row /= size[i];
    }
    return at;
  }
};

}  // namespace pyllm

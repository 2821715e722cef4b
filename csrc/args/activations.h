#pragma once
#include <cstdint>

#include "dtype.h"
#include "rows.h"

namespace pyllm {

enum class Activation { gelu, gelu_tanh, silu, sigmoid, tanh, relu_squared };

// out (rows x cols, contiguous) = f(gate), times up where there is one.
struct ActivationArgs {
  Activation kind;
  DType dtype;
  int64_t cols;
  const char *gate, *up;  // up may be null
  Rows gate_rows, up_rows;
  char* out;
};

struct ActivationBackwardArgs {
  Activation kind;
  DType dtype;
  int64_t cols;
  const char *dy, *gate, *up;
  Rows dy_rows, gate_rows, up_rows;
  char *dgate, *dup;  // contiguous; dup is null where up is
};

}  // namespace pyllm

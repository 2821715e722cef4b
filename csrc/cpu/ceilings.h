#pragma once
#include "cpu/dispatch.h"

namespace pyllm {

// `rounds` rounds of kMultiplyAdds multiply-adds of a vector in registers, by every thread.
constexpr int64_t kMultiplyAdds = 12;
struct MultiplyAddArgs {
  int64_t rounds;
  int64_t* flops;  // how many operations that was, a multiply-add counted as two
};

// Every float of data read once.
struct ReadArgs {
  const float* data;
  int64_t count;
};

PYLLM_KERNEL(multiply_add, MultiplyAddArgs)
PYLLM_KERNEL(read, ReadArgs)

}  // namespace pyllm

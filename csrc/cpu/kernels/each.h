// A walk over contiguous elements, each by itself, from several inputs to several outputs.
#pragma once
#include <algorithm>

#include "cpu/kernels/vec.h"

namespace pyllm::ISA {
namespace {

// Bytes that are asked for ahead. The processor's own prefetching begins anew at each page; and a store that waits for its
// line holds up later loads whose addresses look like its own, being the same within a page.
constexpr int64_t kAhead = 1024;

// f(x, y) for n elements: a vector of each input to one of each output. Several at once, side by side: the chain of
// operations from one input to its output may be longer than what a core looks ahead.
template <int kInputs, int kOutputs, class T, class F>
VEC void each(int64_t n, const T* const (&in)[kInputs], T* const (&out)[kOutputs], const F& f) {
  constexpr int kAtOnce = W == 16 ? 4 : 2;  // as registers allow
  int64_t i = 0;
  for (; i + kAtOnce * W <= n; i += kAtOnce * W) {
    V x[kInputs][kAtOnce], y[kOutputs][kAtOnce];
    UNROLL for (int64_t line = kAhead; line < kAhead + kAtOnce * W * static_cast<int64_t>(sizeof(T)); line += 64) {
      UNROLL for (int k = 0; k < kInputs; k++) __builtin_prefetch(reinterpret_cast<const char*>(in[k] + i) + line);
      UNROLL for (int k = 0; k < kOutputs; k++) __builtin_prefetch(reinterpret_cast<char*>(out[k] + i) + line, 1);
    }
    UNROLL for (int k = 0; k < kInputs; k++) UNROLL for (int j = 0; j < kAtOnce; j += 2)
        load_pair(in[k] + i + j * W, x[k][j], x[k][j + 1]);
    UNROLL for (int j = 0; j < kAtOnce; j++) {
      V from[kInputs], to[kOutputs];
      UNROLL for (int k = 0; k < kInputs; k++) from[k] = x[k][j];
      f(from, to);
      UNROLL for (int k = 0; k < kOutputs; k++) y[k][j] = to[k];
    }
    UNROLL for (int k = 0; k < kOutputs; k++) UNROLL for (int j = 0; j < kAtOnce; j += 2)
        store_pair(out[k] + i + j * W, y[k][j], y[k][j + 1]);
  }
  for (; i < n; i += W) {
    const int64_t count = std::min<int64_t>(W, n - i);
    V from[kInputs], to[kOutputs];
    UNROLL for (int k = 0; k < kInputs; k++) from[k] = get(in[k] + i, count);
    f(from, to);
    UNROLL for (int k = 0; k < kOutputs; k++) write(out[k] + i, to[k], count);
  }
}

}  // namespace
}  // namespace pyllm::ISA

#pragma once
#include <cstdint>

#include "dtype.h"

namespace pyllm {

constexpr int64_t kWkvChunk = 16;      // steps between the states that the forward pass keeps
constexpr int64_t kMostCudaDim = 128;  // of a head on a CUDA device, in whose registers its state must fit

struct WkvInput {  // of step t, sequence b, head h: data + b * batch + t * time + h * head elements
  const char* data;
  int64_t batch, time, head;
};

struct WkvShape {
  int64_t batch, time, heads, dim;
  DType dtype;
  const int64_t* lengths;     // of 0 to time, or null: all are `time` long; on a CUDA device not yet checked
  WkvInput r, w, k, v, a, b;  // (batch, time, heads, dim), w the logarithm of the decay
  const float* state;         // (batch, heads, dim, dim), keys by values, contiguous; or null: zeros
};

struct WkvArgs {
  WkvShape shape;
  char* y;             // (batch, time, heads, dim), contiguous; zeros beyond a sequence's length
  float* final_state;  // like state
  float* kept;  // (batch, heads, (time - 1) / kWkvChunk, dim, dim): before steps kWkvChunk, 2 kWkvChunk, ...; or null
};

struct WkvBackwardArgs {
  WkvShape shape;
  const float* kept;
  WkvInput dy;
  const float* dfinal;                // like state, or null
  char *dr, *dw, *dk, *dv, *da, *db;  // (batch, time, heads, dim), contiguous
  float* dstate;                      // or null
};

}  // namespace pyllm

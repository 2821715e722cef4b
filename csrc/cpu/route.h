#pragma once
#include "cpu/dispatch.h"
#include "dtype.h"

namespace pyllm {

// Each row's `active` most likely experts and how likely they are, and all rows in order of their experts:
// sorted position p holds a copy of row order[p] for the expert whose offsets[e] <= p < offsets[e + 1], and the row's
// i-th expert finds it at places[row * active + i].
struct RouteArgs {
  int64_t rows, experts, active;
  bool normalised;  // a row's weights are made to sum to one
  DType dtype;
  const char* logits;
  int64_t row_step;
  float* weights;                     // (rows, active)
  int64_t *order, *places, *offsets;  // (rows * active,) twice, (experts + 1,)
};

// The gradient of the logits, from that of the weights.
struct RouteBackwardArgs {
  int64_t rows, experts, active;
  bool normalised;
  DType dtype;
  const char* logits;
  int64_t row_step;
  const float *weights, *dweights;  // (rows, active)
  const int64_t *places, *offsets;
  char* dlogits;  // (rows, experts)
};

PYLLM_KERNEL(route, RouteArgs)
PYLLM_KERNEL(route_backward, RouteBackwardArgs)

}  // namespace pyllm

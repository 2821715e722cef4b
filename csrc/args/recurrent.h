#pragma once
#include <cstdint>

#include "args/quantized_linear.h"
#include "dtype.h"

namespace pyllm {

enum class Recurrence : int { rnn_tanh, rnn_relu, gru, lstm };

constexpr int64_t gates_of(Recurrence kind) {  // blocks of `hidden` rows in a weight, in torch's order
  return kind == Recurrence::lstm ? 4 : kind == Recurrence::gru ? 3 : 1;
}

struct StridedMatrix {  // strides in elements; data may be null where the argument is optional
  const char* data;
  int64_t row, column;
};

// One direction of one layer. Time comes first: row t * batch + b of x, y, gates, ... belongs to step t of sequence b.
// Everything has `dtype`, but for what is float* here.
struct RecurrentShape {
  Recurrence kind;
  bool reverse;  // time runs backwards, from the end of each sequence
  int64_t time, batch, inputs, hidden;
  DType dtype;
  const int64_t *lengths, *order;  // of 0 to time, and sequences by falling length; or null: all are `time` long
  StridedMatrix x, w_ih, w_hh;     // (time * batch, inputs), (gates * hidden, inputs or hidden)
  StridedMatrix h0, c0;            // (batch, hidden), or null: zeros; c0 of an lstm only
};

// What the forward pass keeps for the backward pass; contiguous, time * batch rows. All null when there will be none.
struct RecurrentActivations {
  float* gates;       // (gates * hidden): after their nonlinearity
  float* new_hidden;  // (hidden), gru: the hidden state's part of the new gate, with its bias
  float* tanh_cell;   // (hidden), lstm
  char* cell;         // (hidden), lstm
};

// A weight (n, k) in panels, in place of a matrix; panels are null where there is none.
struct PackedMatrix {
  QuantizedWeight weight;
  const char* panels;
};

struct RecurrentArgs {
  RecurrentShape shape;
  PackedMatrix packed_ih, packed_hh;
  StridedMatrix b_ih, b_hh;  // (1, gates * hidden), or null
  char* y;                   // rows y_step apart, or null
  int64_t y_step;
  char *h_n, *c_n;  // (batch, hidden), contiguous
  RecurrentActivations keep;
};

// What backward passes are given alike, wherever they run.
struct RecurrentGradients {
  RecurrentShape shape;
  RecurrentActivations kept;
  const char* y;  // as the forward pass wrote it
  int64_t y_step;
  const char* dy;  // of step t, sequence b: dy + t * dy_time + b * dy_batch elements; or null
  int64_t dy_time, dy_batch;
  const char *dh_n, *dc_n;  // (batch, hidden), contiguous, or null
  char *dh0, *dc0;          // likewise: results
};

struct RecurrentBackwardArgs : RecurrentGradients {
  // Results, contiguous, each may be null. dx may be float32 whatever dtype, and is added to where add_dx.
  char *dx, *dw_ih, *dw_hh, *db_ih, *db_hh;
  DType dx_dtype;
  bool add_dx;
};

// The steps of one direction of one layer where the products of its inputs are given, as on CUDA devices, whose library
// makes them: the shape's x and w_ih are null, so is order, and lengths are on the device, and not yet checked.
struct RecurrentStepsArgs {
  RecurrentShape shape;
  StridedMatrix b_ih, b_hh;  // (1, gates * hidden), or null
  float* sums;               // (time * batch, gates * hidden): x w_ih', without a bias
  char* y;                   // rows y_step apart
  int64_t y_step;
  char *h_n, *c_n;            // (batch, hidden), contiguous
  RecurrentActivations keep;  // where there is a backward pass, gates take the place of sums
};

struct RecurrentStepsBackwardArgs : RecurrentGradients {
  char* dsums;      // (time * batch, gates * hidden): the gradient of sums, in the shape's dtype
  char* dproducts;  // gru: likewise that of the products with w_hh, which are the same but for the new gate
};

}  // namespace pyllm

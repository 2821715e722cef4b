#pragma once
#include <cstdint>

#include "dtype.h"
#include "rows.h"

namespace pyllm {

enum class Reduction { none, sum, mean };

struct Targets {  // a class for each row, or `ignored`
  const char* data;
  DType dtype;
  int64_t ignored;

  int64_t operator[](int64_t row) const {
    return dtype == DType::i64 ? reinterpret_cast<const int64_t*>(data)[row]
                               : reinterpret_cast<const int32_t*>(data)[row];
  }
};

struct Loss {
  Targets targets;
  float smoothing;
  Reduction reduction;

  bool ignores(int64_t row) const { return targets[row] == targets.ignored; }
};

struct CrossEntropyArgs {
  Rows rows;  // of logits, each `classes` contiguous elements
  int64_t classes;
  DType dtype;
  const char* logits;
  Loss loss;
  float* losses;      // rows, or null
  float* statistics;  // rows x (the largest logit, the sum of exp(logit - largest)), or null
  float* total;       // sum or mean; unused for Reduction::none
};

struct CrossEntropyBackwardArgs {
  Rows rows;
  int64_t classes;
  DType dtype;
  const char* logits;
  Loss loss;
  const float *statistics, *dloss;  // dloss: one a row for Reduction::none, else one
  char* dlogits;                    // rows x classes, contiguous
};

// The same of logits = x weight^T + bias, of which only a block (block_rows x block_columns) exists at a time. Gradients
// need block_columns == classes.
struct LinearCrossEntropyArgs {
  int64_t rows, width, classes, block_rows, block_columns;
  const char *x, *weight, *bias;  // rows x width, classes x width, classes or null
  DType dtype;
  int64_t x_row, x_column, weight_row, weight_column;
  Loss loss;
  float* block;
  float *losses, *total;  // losses may be null; total is unused for Reduction::none
  const float* dloss;     // as above; null: 1
  char* dx;               // rows x width, contiguous, or null
  char* dweight;          // classes x width, contiguous, or null
  DType dweight_dtype;    // float32, or, where one block holds all rows, x's
  float* dbias;           // classes, or null
};

}  // namespace pyllm

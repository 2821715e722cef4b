#pragma once
#include <cstdint>

#include "dtype.h"

namespace pyllm {

// One row's settings, checked.
struct SampleSettings {
  float temperature = 1, top_p = 1, min_p = 0, typical_p = 1, repetition = 1, frequency = 0, presence = 0;
  int64_t top_k = 0, seed = 0, position = 0;
};

enum class SampleStatus : uint8_t { ok, bad_logits, all_masked, bad_processed, all_masked_by_bias };

// Row i of the logits at logits + i * logits_stride elements, its columns adjacent, likewise bias. Nothing is drawn for
// a row whose status is not ok.
struct SampleArgs {
  int64_t rows, vocab;
  DType dtype;
  const char* logits;
  int64_t logits_stride;
  const SampleSettings* settings;  // (rows,)
  const int64_t* history;          // (rows, history_length), -1 where there is none; or null
  int64_t history_length, history_stride, history_step;
  const float* bias;  // or null
  int64_t bias_stride;
  const int64_t* given;  // (rows,): an id that is taken in place of a draw, or -1; or null
  int64_t* ids;
  float *logprobs, *processed;
  SampleStatus* status;  // (rows,)
};

}  // namespace pyllm

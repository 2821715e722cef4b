#pragma once
#include "cpu/kernels/gemm.h"
#include "cpu/quantized_linear.h"

namespace pyllm::ISA {

constexpr int64_t kTileRows = 16;

// Rows of x, quantised, as the tiles read them.
struct QuantizedRows {
  int64_t groups, bytes;  // `bytes` a row
  int8_t* values;         // a quad after another; without VNNI those of 8 bits 0, 2, 1, 3 as 16 bits
  float *scales, *sums;   // a group's scale, and scale times the sum of its values
  int32_t* starts;        // what a group's whole sums start from
  bool on_tiles;          // then scales and sums lie [row / kTileRows][group][kTileRows]
  int64_t at(int64_t row, int64_t g) const {
    return on_tiles ? (row / kTileRows * groups + g) * kTileRows + row % kTileRows : row * groups + g;
  }
};

// kTileRows rows from `row` on, a multiple of it, by one panel widened by `widen_panel`, on the tile registers (amx): fp32 sums
// to out (kTileRows x kPanel), with the bits that any other kernel gives.
int64_t wide_panel_bytes(const QuantizedWeight& w);
void widen_panel(const QuantizedWeight& w, const char* panel, char* out);
void quantized_tiles(const QuantizedWeight& w, const QuantizedRows& x, int64_t row, const char* panel, float* out);

}  // namespace pyllm::ISA

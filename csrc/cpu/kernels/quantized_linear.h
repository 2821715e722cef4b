#pragma once
#include "cpu/kernels/gemm.h"
#include "cpu/quantized_linear.h"

namespace pyllm::ISA {

constexpr int64_t kTileRows = 16;

namespace {

VEC V load_scale(const char* p, DType dtype, int64_t at) {
  return dtype == DType::f16 ? load(reinterpret_cast<const f16*>(p) + at)
                             : load(reinterpret_cast<const float*>(p) + at);
}

}  // namespace

// Rows of x, quantised, as the tiles read them.
struct QuantizedRows {
  int64_t spans, bytes;  // `bytes` a row
  int8_t* values;        // a quad after another; without VNNI those of 8 bits 0, 2, 1, 3 as 16 bits
  float *scales, *sums;  // a span's scale, and scale times the sum of its values
  int32_t* starts;       // what a span's whole sums start from
  bool on_tiles;         // then scales and sums lie [row / kTileRows][span][kTileRows]
  int64_t at(int64_t row, int64_t s) const {
    return on_tiles ? (row / kTileRows * spans + s) * kTileRows + row % kTileRows : row * spans + s;
  }
};

// tile_rows() rows from `row` on, a multiple of it, by one panel widened by `widen_panel`, on the tile registers (amx): fp32
// sums to out (tile_rows() x kPanel), with the bits that any other kernel gives.
constexpr int64_t tile_rows(const QuantizedWeight& w) { return w.span > 1 ? 2 * kTileRows : kTileRows; }
int64_t wide_panel_bytes(const QuantizedWeight& w);
void widen_panel(const QuantizedWeight& w, const char* panel, char* out);
void quantized_tiles(const QuantizedWeight& w, const QuantizedRows& x, int64_t row, const char* panel, float* out);

}  // namespace pyllm::ISA

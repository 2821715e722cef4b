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

// Of W columns from `at` on, how far the elements of a group can reach.
VEC V reach_of(const QuantizedWeight& w, const char* scales, int64_t at) {
  const V scale = load_scale(scales, w.scale_dtype, at);
  if (!w.has_minimums) return abs(scale) * 8.0f;
  const V minimum = load_scale(scales, w.scale_dtype, kPanel + at);
  return max(abs(minimum), abs(minimum + scale * 15.0f));
}

// Of W columns, the units of a span, which begins with this group of the panel. (Those of zeros do not matter.)
struct Units {
  V size, inverse;
};
VEC Units units_of(const QuantizedWeight& w, const char* panel, int64_t groups, int64_t at) {
  V reach = set(1e-12f);  // less than any scale of float16 reaches
  const char* scales = panel + w.value_bytes() * kPanel;
  for (int64_t g = 0; g < groups; g++, scales += w.group_bytes(kPanel)) reach = max(reach_of(w, scales, at), reach);
  const VI power = as_int(reach) & 0x7f800000;
  return {as_float(power) * 0.015625f, as_float((254 << 23) - power) * 64.0f};
}

}  // namespace

// Rows of x, quantised, as the tiles read them.
struct QuantizedRows {
  int64_t spans, parts, bytes;  // a row's; parts: its spans or, of a weight in units, groups
  int8_t* values;               // a quad after another; without VNNI those of 8 bits 0, 2, 1, 3 as 16 bits
  float* scales;                // a span's
  float* sums;                  // of a part's values, times its scale unless the weight is in units
  int32_t* starts;              // what a part's whole sums start from
  bool on_tiles;                // then scales and sums lie [row / kTileRows][span][kTileRows]
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

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

// The rows of x in blocks of almost the same size, each of which passes by a panel as one tile.
struct RowBlocks {
  int64_t count, size, longer;  // as many as are longer by a row come first
  RowBlocks(int64_t rows, int64_t most) : count((rows + most - 1) / most), size(rows / count), longer(rows % count) {}
  int64_t first(int64_t block) const { return block * size + std::min(block, longer); }
  int64_t rows(int64_t block) const { return size + (block < longer); }
  int64_t of(int64_t row) const {
    const int64_t of_longer = longer * (size + 1);
    return row < of_longer ? row / (size + 1) : longer + (row - of_longer) / size;
  }
};

// Rows of x, quantised, as tiles read them: what all rows of a block have at a place of k lies together. On the tile
// registers a block is kTileRows, filled up, and only their scales and sums lie so.
struct QuantizedRows {
  int64_t spans, parts, bytes;  // a row's; parts: its spans or, by a weight in units, groups
  int zero;                     // of the weight's values: it times a part's sum is what whole sums begin without
  int8_t* values;               // [block][quad][row][4]; without VNNI those of 8 bits 0, 2, 1, 3 as 16 bits
  float* scales;                // [block][span][row]
  float* sums;                  // [block][part][row]: of a part's values, times its scale unless the weight is in units
  int32_t* starts;              // likewise, what a part's whole sums start from
  RowBlocks blocks;
  bool on_tiles;
};

namespace {

// `rows` rows of sums (x kPanel) from row i and column j on, to the result.
[[maybe_unused]] void write_sums(const QuantizedLinearArgs& p, const float* sums, int64_t i, int64_t rows, int64_t j) {
  const int64_t n = p.weight.n;
  with_dtype(p.dtype, [&](auto* tag) {
    const auto* bias = reinterpret_cast<decltype(tag)>(const_cast<char*>(p.bias));
    auto* c = reinterpret_cast<decltype(tag)>(p.c);
    const int64_t columns = std::min(kPanel, n - j), low = std::min<int64_t>(W, columns), high = columns - low;
    V add[2] = {};
    if (bias) add[0] = get(bias + j, low), add[1] = high ? get(bias + j + W, high) : V{};
    c += i * n + j;
    for (int64_t r = 0; r < rows; r++, c += n, sums += kPanel) {
      const V v[2] = {load(sums) + add[0], load(sums + W) + add[1]};
      if (columns == kPanel) {
        store(c, v[0]), store(c + W, v[1]);
      } else {
        write(c, v[0], low);
        if (high) write(c + W, v[1], high);
      }
    }
  });
}

}  // namespace

// The product on the tile registers (amx), of x with on_tiles and rows filled up to a multiple of tile_rows(): with the
// bits that any other kernel gives.
constexpr int64_t tile_rows(const QuantizedWeight& w) { return w.span > 1 ? 2 * kTileRows : kTileRows; }
void quantized_linear_on_tiles(const QuantizedLinearArgs& p, const QuantizedRows& x);

}  // namespace pyllm::ISA

// fp32 by fp32 on the tile registers (kernels/tiles.h), which multiply bf16 alone: a factor is cut into three parts of
// bf16 that add up to it, high + middle + low, and six products of parts are summed where vectors would sum one. Those
// that are left out (middle by low, low by middle, low by low) are below 2^-23 of the product, and of either sign. An
// instruction multiplies sixteen times as much as one of vectors, so that six of them are still 2.7 times as fast, less
// the cutting.
#pragma once
#include "cpu/kernels/tiles.h"

#if ISA_AVX512

namespace pyllm::ISA {
namespace {

enum Part { kHigh, kMiddle, kLow, kParts };

constexpr int64_t kCutBytes = kParts * kTileBytes;  // 16 lines by 32 of k: a tile for each part

struct Floats {  // where a factor's lines (A's rows, B's columns) lie, in elements
  const float* data;
  int64_t step, k_step, count;
};

// The parts of two vectors, each as words of an element of `first` and one of `second`, to a row of a tile. The high
// part is cut off, so that no number overflows, the middle one is rounded.
VEC void cut(V first, V second, char* out) {
  constexpr auto kUpper = static_cast<int32_t>(0xffff0000);
  const auto upper = [](V v) { return as_float(as_int(v) & kUpper); };
  const auto put_words = [&](Part part, V a, V b) {
    const VI lower = as_int(a) >> 16;
#if __AVX512F__
    const auto words = _mm512_mask_blend_epi16(0xaaaaaaaa, reinterpret_cast<__m512i>(lower), _mm512_castps_si512(b));
#else
    const VI words = (lower & ~kUpper) | (as_int(b) & kUpper);
#endif
    std::memcpy(out + part * kTileBytes, &words, sizeof words);
  };
  const V rest[2] = {first - upper(first), second - upper(second)};
  const VI half = set_int(0x8000);  // of the last bit that is kept
  const V middle[2] = {as_float(wrapping_add(as_int(rest[0]), half)), as_float(wrapping_add(as_int(rest[1]), half))};
  put_words(kHigh, first, second);
  put_words(kMiddle, middle[0], middle[1]);
  put_words(kLow, rest[0] - upper(middle[0]), rest[1] - upper(middle[1]));
}

// 16 lines from `line` on by 32 of k from k0 on, those beyond the factor zeros, to a tile for each part: a left tile's
// rows, a line each, or a right one's, with what is multiplied together in the same places: k and k + 16 side by side.
[[maybe_unused]] void cut_lines(const Floats& x, int64_t k, int64_t line, int64_t k0, bool right, char* out) {
  const int64_t lines = std::min(x.count - line, kTileSide), depth = std::min(kDepth, k - k0);
  const int64_t row_step = right ? x.k_step : x.step, column_step = right ? x.step : x.k_step;
  const int64_t half = W * x.k_step;  // from one row's first vector to its second
  const float* from = x.data + line * x.step + k0 * x.k_step;
  if (lines == kTileSide && depth == kDepth && column_step == 1) {
    UNROLL for (int r = 0; r < W; r++) cut(load(from + r * row_step), load(from + half + r * row_step), out + r * 64);
    return;
  }
  V first[W], second[W];
  if (lines == kTileSide && depth == kDepth && row_step == 1) {
    load_transposed(from, column_step, first);
    load_transposed(from + half, column_step, second);
  } else {
    const auto gather = [&](const float* at, int64_t count, V* rows) {
      float block[W][W] = {};
      for (int64_t r = 0; r < (right ? count : lines); r++)
        for (int64_t j = 0; j < (right ? lines : count); j++) block[r][j] = at[r * row_step + j * column_step];
      for (int r = 0; r < W; r++) rows[r] = load(block[r]);
    };
    gather(from, std::min<int64_t>(depth, W), first);
    gather(from + half, depth - W, second);
  }
  UNROLL for (int r = 0; r < W; r++) cut(first[r], second[r], out + r * 64);
}

// The registers' sums, of kDown tiles by kAcross, 0 and 1 above 2 and 3, += 16 kDown lines of the left factor by 16
// kAcross of the right one over 32 of k. A factor is cut in three, or bf16 as it is; 16 lines lie `*_line` bytes from the
// next. Of the six products in parts one part changes at a time: more tiles would have to be loaded otherwise.
template <int kOf, int kDown, int kAcross>
VEC void dot_step(const char* left, int64_t left_line, const char* right, int64_t right_line) {
  const auto left_part = [&](int part) __attribute__((always_inline)) {
    load_tile<4>(left + part * kTileBytes, 64);
    if constexpr (kDown == 2) load_tile<5>(left + left_line + part * kTileBytes, 64);
  };
  const auto right_part = [&](int part) __attribute__((always_inline)) {
    load_tile<6>(right + part * kTileBytes, 64);
    if constexpr (kAcross == 2) load_tile<7>(right + right_line + part * kTileBytes, 64);
  };
  const auto multiply = []() __attribute__((always_inline)) {
    dot_bf16_tiles<0, 4, 6>();
    if constexpr (kAcross == 2) dot_bf16_tiles<1, 4, 7>();
    if constexpr (kDown == 2) dot_bf16_tiles<2, 5, 6>();
    if constexpr (kDown == 2 && kAcross == 2) dot_bf16_tiles<3, 5, 7>();
  };
  if constexpr (kOf == 1) {
    left_part(0), right_part(0), multiply();
  } else {
    left_part(kHigh), right_part(kLow), multiply();
    right_part(kMiddle), multiply();
    left_part(kMiddle), multiply();
    right_part(kHigh), multiply();
    left_part(kHigh), multiply();
    left_part(kLow), multiply();
  }
}

}  // namespace
}  // namespace pyllm::ISA

#endif

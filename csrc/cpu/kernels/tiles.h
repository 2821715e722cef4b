// The processor's tile registers (AMX): eight, each of up to 16 rows of 64 bytes, written as assembly since files are not
// compiled for them (cpu::has_amx must hold). Register numbers are template arguments. The dot products multiply a tile
// of 16 rows, along whose rows k lies, by one that holds, in row q, k's elements 2q, 2q + 1 of bf16 (4q to 4q + 3 of
// bytes) of each of 16 columns side by side.
//
// bf16: even and odd k are two chains of fused multiply-adds from zero, added to each other and then to C. Denormals
// count as zeros.
#pragma once
#include <algorithm>

#include "cpu/kernels/vec.h"

namespace pyllm::ISA {
namespace {

constexpr int64_t kTileSide = 16, kTileBytes = 1024;
constexpr int64_t kDepth = 32, kPairs = 16;  // k and pairs of k in a tile of bf16

// Shapes of the registers. By default C's 0 to 3 have 16 rows of `columns` floats or integers, the left factors 4 and 5
// have 16 rows of 4 * `quads` bytes, the right factors 6 and 7 `quads` rows of `columns` times 4 bytes.
struct TileShape {
  int rows, row_bytes;
};
[[maybe_unused]] TileShape default_shape(int t, int columns, int quads) {
  return {t < 6 ? static_cast<int>(kTileSide) : quads, 4 * (t == 4 || t == 5 ? quads : columns)};
}

[[maybe_unused]] float factor_of_tile(bf16 x) {  // as dot_bf16_tiles reads it
  return x.bits & 0x7f80 ? to_float(x) : __builtin_copysignf(0.0f, to_float(x));
}

#if __AVX512F__

class TileShapes {  // all registers become zeros
 public:
  TileShapes(int columns, int quads) : TileShapes([=](int t) { return default_shape(t, columns, quads); }) {}
  template <class F>
  explicit TileShapes(const F& shape_of) {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int t = 0; t < 8; t++) {
      const TileShape shape = shape_of(t);
      shapes.rows[t] = static_cast<uint8_t>(shape.rows);
      shapes.row_bytes[t] = static_cast<uint16_t>(shape.row_bytes);
    }
    asm volatile("ldtilecfg %0" : : "m"(shapes));
  }
  ~TileShapes() { asm volatile("tilerelease"); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;
};

template <int kTo>
VEC void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTo));
}
template <int kTo>
VEC void load_tile(const void* p, int64_t step) {  // rows `step` bytes apart
  asm volatile("tileloadd (%0, %1, 1), %%tmm%c2" : : "r"(p), "r"(step), "i"(kTo) : "memory");
}
template <int kFrom>
VEC void store_tile(void* p, int64_t step) {
  asm volatile("tilestored %%tmm%c2, (%0, %1, 1)" : : "r"(p), "r"(step), "i"(kFrom) : "memory");
}
template <int kSum, int kLeft, int kRight>
VEC void dot_bf16_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
}
template <int kSum, int kLeft, int kRight, bool kUnsigned>
VEC void dot_byte_tiles() {  // of signed bytes, or unsigned ones on the right
  if constexpr (kUnsigned)
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
  else
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
}

// 2 W floats to bf16, with the conversion that comes with the tiles: denormals become zeros.
VEC void store_bf16(bf16* p, V low, V high) {
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(low) : "v"(low), "v"(high));
  std::memcpy(static_cast<void*>(p), &low, sizeof low);
}
// The same, element l of `even` before element l of `odd`: a row of a right factor.
VEC void store_bf16_pairs(bf16* p, V even, V odd) {
  using Words = uint16_t __attribute__((vector_size(4 * W)));
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(even) : "v"(even), "v"(odd));
  Words order, words = reinterpret_cast<Words>(even);
  UNROLL for (int l = 0; l < W; l++) order[2 * l] = static_cast<uint16_t>(l),
                                               order[2 * l + 1] = static_cast<uint16_t>(l + W);
  words = __builtin_shuffle(words, order);
  std::memcpy(static_cast<void*>(p), &words, sizeof words);
}

#elif ISA_AVX512  // the same in plain code, for PYLLM_EMULATE_AVX512

struct EmulatedTiles {
  int rows[8], row_bytes[8];
  alignas(64) uint8_t bytes[8][kTileSide][64];
};
EmulatedTiles& emulated_tiles() {
  static thread_local EmulatedTiles tiles;
  return tiles;
}

class TileShapes {
 public:
  TileShapes(int columns, int quads) : TileShapes([=](int t) { return default_shape(t, columns, quads); }) {}
  template <class F>
  explicit TileShapes(const F& shape_of) {
    EmulatedTiles& t = emulated_tiles();
    std::memset(&t, 0, sizeof t);
    for (int i = 0; i < 8; i++) {
      t.rows[i] = shape_of(i).rows;
      t.row_bytes[i] = shape_of(i).row_bytes;
    }
  }
};

template <int kTo>
void zero_tile() {
  std::memset(emulated_tiles().bytes[kTo], 0, kTileBytes);
}
template <int kTo>
void load_tile(const void* p, int64_t step) {
  EmulatedTiles& t = emulated_tiles();
  for (int r = 0; r < t.rows[kTo]; r++)
    std::memcpy(t.bytes[kTo][r], static_cast<const char*>(p) + r * step, t.row_bytes[kTo]);
}
template <int kFrom>
void store_tile(void* p, int64_t step) {
  EmulatedTiles& t = emulated_tiles();
  for (int r = 0; r < t.rows[kFrom]; r++)
    std::memcpy(static_cast<char*>(p) + r * step, t.bytes[kFrom][r], t.row_bytes[kFrom]);
}

// f(element of C, left row, right rows, the row's bytes before a column's quad) for every element of C.
template <int kSum, int kLeft, int kRight, class Element, class F>
void each_of_tile(const F& f) {
  EmulatedTiles& t = emulated_tiles();
  for (int m = 0; m < t.rows[kSum]; m++)
    for (int n = 0; n < t.row_bytes[kSum] / 4; n++) {
      Element c;
      std::memcpy(&c, t.bytes[kSum][m] + 4 * n, 4);
      c = f(c, t.bytes[kLeft][m], t.bytes[kRight], 4 * n, t.rows[kRight]);
      std::memcpy(t.bytes[kSum][m] + 4 * n, &c, 4);
    }
}
template <int kSum, int kLeft, int kRight>
void dot_bf16_tiles() {
  const auto wide = [](const uint8_t* p) {
    bf16 h;
    std::memcpy(static_cast<void*>(&h), p, 2);
    return factor_of_tile(h);
  };
  each_of_tile<kSum, kLeft, kRight, float>([&](float c, const uint8_t* left, auto right, int at, int quads) {
    float even = 0, odd = 0;
    for (int q = 0; q < quads; q++) {
      even = __builtin_fmaf(wide(left + 4 * q), wide(right[q] + at), even);
      odd = __builtin_fmaf(wide(left + 4 * q + 2), wide(right[q] + at + 2), odd);
    }
    return c + (even + odd);
  });
}
template <int kSum, int kLeft, int kRight, bool kUnsigned>
void dot_byte_tiles() {
  each_of_tile<kSum, kLeft, kRight, int32_t>([](int32_t c, const uint8_t* left, auto right, int at, int quads) {
    for (int q = 0; q < quads; q++)
      for (int b = 0; b < 4; b++) {
        const uint8_t y = right[q][at + b];
        c += static_cast<int8_t>(left[4 * q + b]) * (kUnsigned ? y : static_cast<int8_t>(y));
      }
    return c;
  });
}

VEC void store_bf16(bf16* p, V low, V high) {
  store(p, low);
  store(p + W, high);
}
VEC void store_bf16_pairs(bf16* p, V even, V odd) {
  for (int l = 0; l < W; l++) put(p + 2 * l, even[l]), put(p + 2 * l + 1, odd[l]);
}

#endif

#if ISA_AVX512

// Where a factor's lines (A's rows, B's columns) lie, in elements.
struct Lines {
  const bf16* data;
  int64_t step, k_step, count;
};

VEC V load_bytes(const bf16* p, int64_t count) {  // of 2 W elements, zeros beyond
  V v;
  if (count >= 2 * W) {
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  bf16 block[2 * W] = {};
  std::memcpy(static_cast<void*>(block), p, std::max<int64_t>(count, 0) * sizeof(bf16));
  std::memcpy(&v, block, sizeof v);
  return v;
}

// 16 lines from `line` on by 32 of k from k0 on, those beyond the factor zeros: as a left tile's rows, a line each, or as a
// right one's, pairs of k.
[[maybe_unused]] void pack_tile(const Lines& x, int64_t k, int64_t line, int64_t k0, bool right, char* out,
                                int64_t out_step) {
  const int64_t lines = std::min(kTileSide, x.count - line), depth = std::min(kDepth, k - k0);
  const bf16* corner = x.data + line * x.step + k0 * x.k_step;
  V rows[W] = {};
  const bool by_pairs = x.k_step != 1 && x.step == 1;
  if (by_pairs) {
    for (int64_t q = 0; 2 * q < depth; q++) {
      const bf16 *even = corner + 2 * q * x.k_step, *odd = even + x.k_step;
      const bool both = 2 * q + 1 < depth;
      const auto some = [&](const bf16* from) {
        VH h{};
        lines == kTileSide ? std::memcpy(&h, from, sizeof h) : std::memcpy(&h, from, lines * sizeof(bf16));
        return h;
      };
      const VH low = some(even), high = both ? some(odd) : VH{};
      rows[q] = as_float(__builtin_convertvector(low, VI) | __builtin_convertvector(high, VI) << 16);
    }
  } else {
    for (int64_t l = 0; l < lines; l++) {
      const bf16* from = corner + l * x.step;
      bf16 block[kDepth];
      if (x.k_step != 1) {
        for (int64_t i = 0; i < depth; i++) block[i] = from[i * x.k_step];
        from = block;
      }
      rows[l] = load_bytes(from, depth);
    }
  }
  if (by_pairs != right) transpose(rows);
  for (int64_t r = 0; r < W; r++, out += out_step) std::memcpy(out, &rows[r], sizeof rows[r]);
}

#endif

}  // namespace
}  // namespace pyllm::ISA

// The processor's tile registers (AMX): eight, each of up to 16 rows of 64 bytes, written as assembly since files are not
// compiled for them (cpu::has_amx must hold). Register numbers are template arguments. The dot products multiply a tile
// of 16 rows, along whose rows k lies, by one that holds, in row q, k's elements 2q, 2q + 1 of bf16 (4q to 4q + 3 of
// bytes) of each of 16 columns side by side.
//
// bf16: even and odd k are two chains of fused multiply-adds from zero, added to each other and then to C. Denormals
// count as zeros.
#pragma once
#include "cpu/kernels/vec.h"

namespace pyllm::ISA {
namespace {

constexpr int64_t kTileSide = 16, kTileBytes = 1024;

#if __AVX512F__

// Shapes of the registers: C's 0 to 3 have 16 rows of `columns` floats or integers, the left factors 4 and 5 have 16 rows
// of 4 * `quads` bytes, the right factors 6 and 7 `quads` rows of `columns` times 4 bytes. All become zeros.
class TileShapes {
 public:
  TileShapes(int columns, int quads) {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int t = 0; t < 8; t++) {
      shapes.rows[t] = t < 6 ? kTileSide : quads;
      shapes.row_bytes[t] = 4 * (t == 4 || t == 5 ? quads : columns);
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
  TileShapes(int columns, int quads) {
    EmulatedTiles& t = emulated_tiles();
    std::memset(&t, 0, sizeof t);
    for (int i = 0; i < 8; i++) {
      t.rows[i] = i < 6 ? kTileSide : quads;
      t.row_bytes[i] = 4 * (i == 4 || i == 5 ? quads : columns);
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
    uint16_t h;
    std::memcpy(&h, p, 2);
    const uint32_t bits = (h & 0x7f80) ? static_cast<uint32_t>(h) << 16 : (h & 0x8000u) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
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

#endif

}  // namespace
}  // namespace pyllm::ISA

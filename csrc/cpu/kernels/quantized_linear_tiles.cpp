// The quantised product on tile registers. A panel's values are widened to signed bytes once for all rows that pass by;
// then, for 16 rows by 16 columns, each group is one product of tiles, whose whole sums go through memory to the fp32 sums
// in the vector registers. The next groups' products run meanwhile.
//
// A wide panel: [group][half of its columns][quad][16 columns][4], then scales, [group][kPanel], then minimums likewise.
#include "cpu/kernels/quantized_linear.h"

#include "cpu/kernels/bytes.h"
#include "cpu/kernels/tiles.h"

namespace pyllm::ISA {

#if ISA_AVX512

namespace {

int64_t value_bytes(const QuantizedWeight& w) { return w.groups * w.group * kPanel; }

V load_scale(const char* p, DType dtype, int64_t at) {
  return dtype == DType::f16 ? load(reinterpret_cast<const f16*>(p) + at)
                             : load(reinterpret_cast<const float*>(p) + at);
}

constexpr int64_t kUnderWay = 4;  // groups: what tiles store is late for a load that follows at once

// 16 rows by 16 columns of one group, in whole numbers.
template <bool kUnsigned>
VEC void multiply(const int8_t* left, int64_t left_bytes, const char* right, int32_t* sums) {
  zero_tile<0>();
  load_tile<4>(left, left_bytes);
  load_tile<6>(right, 64);
  dot_byte_tiles<0, 4, 6, kUnsigned>();
  store_tile<0>(sums, 64);
}

template <bool kMinimums>
VEC void add(V (&total)[kTileRows], const int32_t* whole, const float* x_scales, const float* x_sums,
             const float* scales, const float* minimums) {
  const V scale = load(scales);
  UNROLL for (int64_t r = 0; r < kTileRows; r++) {
    total[r] = fma(__builtin_convertvector(load_lanes(whole + r * W), V), scale * x_scales[r], total[r]);
    if constexpr (kMinimums) total[r] = fma(load(minimums), set(x_sums[r]), total[r]);
  }
}

template <bool kUnsigned, bool kMinimums>
void squares(const QuantizedRows& x, int64_t row, int64_t group_size, const char* panel, int64_t values, float* out) {
  const TileShapes shapes(kTileSide, static_cast<int>(group_size / 4));
  const int64_t tile_bytes = group_size * kTileSide, groups = x.groups, row_bytes = x.bytes;
  alignas(64) int32_t sums[kUnderWay][kTileRows * W];
  for (int64_t half = 0; half < 2; half++) {
    const auto* scales = reinterpret_cast<const float*>(panel + values) + half * W;
    const float *minimums = scales + groups * kPanel, *x_scales = x.scales + row * groups,
                *x_sums = x.sums + row * groups;
    const char* right = panel + half * tile_bytes;
    const int8_t* left = x.values + row * row_bytes;
    V total[kTileRows] = {};
    for (int64_t g = 0; g < groups + kUnderWay - 1; g++) {
      if (g < groups) {
        multiply<kUnsigned>(left, row_bytes, right, sums[g % kUnderWay]);
        left += group_size, right += 2 * tile_bytes;
      }
      if (g < kUnderWay - 1) continue;
      add<kMinimums>(total, sums[(g + 1) % kUnderWay], x_scales, x_sums, scales, minimums);
      x_scales += kTileRows, x_sums += kTileRows, scales += kPanel, minimums += kPanel;
    }
    UNROLL for (int64_t r = 0; r < kTileRows; r++) store(out + r * kPanel + half * W, total[r]);
  }
}

}  // namespace

int64_t wide_panel_bytes(const QuantizedWeight& w) {
  return value_bytes(w) + w.groups * kPanel * static_cast<int64_t>(sizeof(float)) * (w.has_minimums ? 2 : 1);
}

void widen_panel(const QuantizedWeight& w, const char* panel, char* out) {
  const int64_t quads = w.group / 4, packed_quads = w.value_bytes() / 4, tile = quads * 64;
  // Without minimums values have a zero point: bytes lose it by a flipped sign bit, halves of bytes by a subtraction.
  const VI flip = set_int(w.bits == 8 && !w.has_minimums ? INT32_MIN | 0x00808080 : 0);
  const bool shift = w.bits == 4 && !w.has_minimums;
  auto* scales = reinterpret_cast<float*>(out + value_bytes(w));
  for (int64_t g = 0; g < w.groups; g++, panel += w.group_bytes(kPanel), out += 2 * tile) {
    for (int64_t q = 0; q < packed_quads; q++)
      for (int64_t half = 0; half < 2; half++) {
        const VI bytes = load_lanes(panel + (2 * q + half) * 64);
        const auto put = [&](int64_t quad, VI v) { std::memcpy(out + half * tile + quad * 64, &v, sizeof v); };
        if (w.bits == 8) {
          put(q, bytes ^ flip);
          continue;
        }
        const auto centred = [&](VI v) {  // in every byte: no borrow crosses, since the high bits are set meanwhile
          return shift ? ((v | (INT32_MIN | 0x00808080)) - 0x08080808) ^ (INT32_MIN | 0x00808080) : v;
        };
        put(q, centred(bytes & 0x0f0f0f0f));
        put(quads / 2 + q, centred((bytes >> 4) & 0x0f0f0f0f));
      }
    const char* from = panel + packed_quads * kPanel * 4;
    for (int64_t j = 0; j < kPanel; j += W) {
      store(scales + g * kPanel + j, load_scale(from, w.scale_dtype, j));
      if (w.has_minimums) store(scales + (w.groups + g) * kPanel + j, load_scale(from, w.scale_dtype, kPanel + j));
    }
  }
}

void quantized_tiles(const QuantizedWeight& w, const QuantizedRows& x, int64_t row, const char* panel, float* out) {
  const int64_t values = value_bytes(w);
  if (!w.has_minimums) return squares<false, false>(x, row, w.group, panel, values, out);
  (w.bits == 8 ? squares<true, true> : squares<false, true>)(x, row, w.group, panel, values, out);
}

#else

int64_t wide_panel_bytes(const QuantizedWeight&) { return 0; }
void widen_panel(const QuantizedWeight&, const char*, char*) {}
void quantized_tiles(const QuantizedWeight&, const QuantizedRows&, int64_t, const char*, float*) {}

#endif

}  // namespace pyllm::ISA

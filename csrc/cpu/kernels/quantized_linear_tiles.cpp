// The quantised product on tile registers. A panel's values are widened to signed bytes once for all rows that pass by;
// then, for 16 rows by 16 columns, each group is one product of tiles, whose whole sums go through memory to the fp32 sums
// in the vector registers. The next groups' products run meanwhile.
//
// Larger groups (spans of those in memory) need that less often: 32 rows by the panel's columns are products of tiles of 64
// along k, four at a time, and the fp32 sums wait in memory. A weight in units is widened to whole numbers of these: two of
// its values by their group's multiple in one product of 16 bits.
//
// Rows pass by as many widened panels as half the second-level cache holds, so that a row's results are written side by
// side; by one panel, if they are no more than a tile's. What is read and written next is asked for a few lines at a time:
// 32 at once held up the tiles' own loads. Of its time, the sums' way through memory and their scaling takes half.
//
// A wide panel: [group][half of its columns][quad][16 columns][4], then scales, [group][kPanel], then minimums likewise. Of
// spans, two groups lie as one, and scales, or units, are [span][kPanel].
#include "cpu/kernels/quantized_linear.h"

#include "cpu/kernels/bytes.h"
#include "cpu/kernels/quantized_linear_units.h"
#include "cpu/kernels/tiles.h"

namespace pyllm::ISA {

#if ISA_AVX512

namespace {

int64_t value_bytes(const QuantizedWeight& w) { return round_up(w.groups, w.span > 1 ? 2 : 1) * w.group * kPanel; }

// What is asked for while rows are multiplied: where their sums will be written, and the panels that are widened next. In
// parts, as many at once would have to wait for each other.
struct Ahead {
  int64_t parts;  // of a block of rows by a panel
  const char *weight, *weight_end;
  int64_t weight_step;  // bytes, a part
  char* out = nullptr;
  int64_t out_step = 0, rows = 0, row_bytes = 0, asked = 0, part = 0;

  VEC void ask_for_part() {
    for (part++; asked * parts < rows * part; asked++, out += out_step)
      for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(out + byte, 1);
    for (const char* end = std::min(weight + weight_step, weight_end); weight < end; weight += 64)
      __builtin_prefetch(weight, 0, 2);
  }
};

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
void squares(const QuantizedRows& x, int64_t row, int64_t group_size, const char* panel, int64_t values, Ahead& ahead,
             float* out) {
  const int64_t tile_bytes = group_size * kTileSide, groups = x.spans, row_bytes = x.bytes;
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
        if (half == 0) ahead.ask_for_part();
      }
      if (g < kUnderWay - 1) continue;
      add<kMinimums>(total, sums[(g + 1) % kUnderWay], x_scales, x_sums, scales, minimums);
      x_scales += kTileRows, x_sums += kTileRows, scales += kPanel, minimums += kPanel;
    }
    UNROLL for (int64_t r = 0; r < kTileRows; r++) store(out + r * kPanel + half * W, total[r]);
  }
}

constexpr int64_t kLong = 64;  // of k in a tile

// Steps along k, of 32 rows by a panel's columns.
VEC void multiply_steps(const int8_t* left, int64_t row_bytes, const char* right, int64_t steps) {
  for (int64_t s = 0; s < steps; s++, left += kLong, right += 2 * kTileBytes) {
    load_tile<4>(left, row_bytes);
    load_tile<6>(right, 64);
    dot_byte_tiles<0, 4, 6, false>();
    load_tile<7>(right + kTileBytes, 64);
    dot_byte_tiles<1, 4, 7, false>();
    load_tile<5>(left + kTileRows * row_bytes, row_bytes);
    dot_byte_tiles<2, 5, 6, false>();
    dot_byte_tiles<3, 5, 7, false>();
  }
}

VEC void store_sums(int32_t* sums) {
  constexpr int64_t bytes = kPanel * sizeof(int32_t);
  store_tile<0>(sums, bytes), store_tile<1>(sums + W, bytes);
  store_tile<2>(sums + kTileRows * kPanel, bytes), store_tile<3>(sums + kTileRows * kPanel + W, bytes);
}

// Whole sums of a span join those in fp32, of 16 rows.
template <bool kUnits>
VEC void add_span(const int32_t* whole, const V (&scale)[2], const float* x_scales, float* out) {
  UNROLL for (int64_t r = 0; r < kTileRows; r++) UNROLL for (int64_t half = 0; half < 2; half++) {
    const int64_t at = r * kPanel + half * W;
    const V sum = __builtin_convertvector(load_lanes(whole + at), V);
    if constexpr (kUnits)
      store(out + at, fma(sum * scale[half], set(x_scales[r]), load(out + at)));
    else
      store(out + at, fma(sum, scale[half] * x_scales[r], load(out + at)));
  }
}

// A span's products, and between their halves what the last one's add up to.
template <bool kUnits>
void spans(const QuantizedWeight& w, const QuantizedRows& x, int64_t row, const char* panel, Ahead& ahead, float* out) {
  alignas(64) int32_t sums[2][2 * kTileRows * kPanel];
  const auto* scales = reinterpret_cast<const float*>(panel + value_bytes(w));
  const float* x_scales = x.scales + row * x.spans;
  const int8_t* left = x.values + row * x.bytes;
  const int64_t long_steps = w.span / 2, all_steps = (w.groups + 1) / 2;
  std::memset(static_cast<void*>(out), 0, 2 * kTileRows * kPanel * sizeof(float));
  for (int64_t s = 0; s <= x.spans; s++) {
    const int64_t steps = std::min(long_steps, all_steps - s * long_steps);  // of the last span, fewer; after it, none
    const V scale[2] = {load(scales + (s - 1) * kPanel), load(scales + (s - 1) * kPanel + W)};
    if (s < x.spans) zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    for (int64_t upper = 0; upper < 2; upper++) {
      const int64_t part = upper == 0 ? (steps + 1) / 2 : steps / 2;
      if (s < x.spans) {
        multiply_steps(left, x.bytes, panel, part);
        left += part * kLong, panel += part * 2 * kTileBytes;
        ahead.ask_for_part();
      }
      if (s > 0)
        add_span<kUnits>(sums[(s - 1) % 2] + upper * kTileRows * kPanel, scale,
                         x_scales + upper * kTileRows * x.spans + (s - 1) * kTileRows,
                         out + upper * kTileRows * kPanel);
    }
    if (s < x.spans) store_sums(sums[s % 2]);
  }
}

int64_t wide_panel_bytes(const QuantizedWeight& w) {
  return value_bytes(w) + w.groups * kPanel * static_cast<int64_t>(sizeof(float)) * (w.has_minimums ? 2 : 1);
}

void widen_panel(const QuantizedWeight& w, const char* panel, char* out) {
  const int64_t quads = w.group / 4, packed_quads = w.value_bytes() / 4, tile = quads * 64;
  const bool paired = w.span > 1;
  if (paired && w.groups % 2) std::memset(out + (w.groups - 1) * 2 * tile, 0, 4 * tile);
  if (w.in_units()) {
    auto* units = reinterpret_cast<float*>(out + value_bytes(w));
    const auto place = [&](int64_t g, int64_t quad, int64_t half) {
      return out + g / 2 * 4 * tile + half * 2 * tile + g % 2 * tile + quad * 64;
    };
    return widen_in_units(w, w.groups, panel, 0, place, [&](int64_t g, int64_t half, V unit) {
      store(units + g / w.span * kPanel + half * W, unit);
    });
  }
  // Without minimums values have a zero point: bytes lose it by a flipped sign bit, halves of bytes by a subtraction.
  const VI flip = set_int(w.bits == 8 && !w.has_minimums ? INT32_MIN | 0x00808080 : 0);
  const bool shift = w.bits == 4 && !w.has_minimums;
  auto* scales = reinterpret_cast<float*>(out + value_bytes(w));
  const int64_t half_bytes = paired ? 2 * tile : tile;
  for (int64_t g = 0; g < w.groups; g++, panel += w.group_bytes(kPanel)) {
    for (int64_t q = 0; q < packed_quads; q++)
      for (int64_t half = 0; half < 2; half++) {
        const VI bytes = load_lanes(panel + (2 * q + half) * 64);
        const auto put = [&](int64_t quad, VI v) { std::memcpy(out + half * half_bytes + quad * 64, &v, sizeof v); };
        if (w.bits == 8) {
          put(q, bytes ^ flip);
          continue;
        }
        const auto centred = [&](VI v) {  // in every byte: no borrow crosses, since the high bits are set meanwhile
          const VI high = set_int(INT32_MIN | 0x00808080);
          return shift ? wrapping_add(v | high, set_int(-0x08080808)) ^ high : v;
        };
        put(q, centred(bytes & 0x0f0f0f0f));
        put(quads / 2 + q, centred((bytes >> 4) & 0x0f0f0f0f));
      }
    const char* from = panel + packed_quads * kPanel * 4;
    out += !paired ? 2 * tile : g % 2 == 0 ? tile : 3 * tile;
    for (int64_t j = 0; j < kPanel; j += W) {
      store(scales + g / w.span * kPanel + j, load_scale(from, w.scale_dtype, j));
      if (w.has_minimums) store(scales + (w.groups + g) * kPanel + j, load_scale(from, w.scale_dtype, kPanel + j));
    }
  }
}

void multiply_rows(const QuantizedWeight& w, const QuantizedRows& x, int64_t row, const char* panel, Ahead& ahead,
                   float* out) {
  if (w.span > 1) return (w.in_units() ? spans<true> : spans<false>)(w, x, row, panel, ahead, out);
  const int64_t values = value_bytes(w);
  if (!w.has_minimums) return squares<false, false>(x, row, w.group, panel, values, ahead, out);
  (w.bits == 8 ? squares<true, true> : squares<false, true>)(x, row, w.group, panel, values, ahead, out);
}

constexpr int64_t kWideBytes = 1 << 19;  // of widened panels, which stay in the second-level cache while rows pass by

}  // namespace

void quantized_linear_on_tiles(const QuantizedLinearArgs& p, const QuantizedRows& x) {
  const QuantizedWeight& w = p.weight;
  const int64_t panels = (w.n + kPanel - 1) / kPanel, panel_bytes = w.groups * w.group_bytes(kPanel);
  const int64_t wide_bytes = round_up(wide_panel_bytes(w), 64), step = tile_rows(w), size = size_of(p.dtype);
  const int64_t most = p.m <= step ? 1 : std::clamp<int64_t>(kWideBytes / wide_bytes, 1, panels);
  const int64_t parts = w.span > 1 ? 2 * x.spans : w.groups;
  const int64_t pieces = std::min(panels, std::max<int64_t>(4 * cpu::num_threads(), (panels + most - 1) / most));
  parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
    const TileShapes shapes(kTileSide, static_cast<int>((w.span > 1 ? kLong : w.group) / 4));
    auto* wide = static_cast<char*>(cpu::scratch(most * wide_bytes, 1));
    alignas(64) float sums[2 * kTileRows * kPanel];
    for (int64_t first = panels * begin / pieces, last = panels * end / pieces; first < last; first += most) {
      const int64_t count = std::min(most, last - first), next = first + count;
      for (int64_t j = 0; j < count; j++) widen_panel(w, p.panels + (first + j) * panel_bytes, wide + j * wide_bytes);
      Ahead ahead = {parts, p.panels + next * panel_bytes, p.panels + std::min(next + most, panels) * panel_bytes,
                     round_up(most * panel_bytes / (parts * count * ((p.m + step - 1) / step)), 64)};
      for (int64_t i = 0; i < p.m; i += step)
        for (int64_t j = 0; j < count; j++) {
          const int64_t rows = std::min(step, p.m - i), column = (first + j) * kPanel;
          ahead.out = p.c + (i * w.n + column) * size, ahead.out_step = w.n * size;
          ahead.rows = rows, ahead.row_bytes = std::min(kPanel, w.n - column) * size;
          ahead.asked = ahead.part = 0;
          multiply_rows(w, x, i, wide + j * wide_bytes, ahead, sums);
          write_sums(p, sums, i, rows, column);
        }
    }
  });
}

#else

void quantized_linear_on_tiles(const QuantizedLinearArgs&, const QuantizedRows&) {}

#endif

}  // namespace pyllm::ISA

// A row of x is quantised once; then a tile, some rows of x by a panel of 2W of the weight's, goes down k span by span
// (a span is a group, or some that share a scale or a unit). Within a span everything is whole numbers: the sums are exact,
// so that instruction sets with and without a dot product of bytes agree. A span adds float(sum) * (scale of x * scale of
// the weight) to the tile's fp32 sums; of a weight in units, (float(sum) * unit) * scale of x, where the first is exact.
// Threads take panels, and panels pass by as many rows of x as stay in the second-level cache.
//
// How four bytes of x meet four of the weight, in each lane:
//  - many rows on tile registers, where there are some: quantized_linear_tiles.cpp;
//  - with VNNI, in one instruction, on signed bytes of x and unsigned ones of the weight;
//  - 4 bits without it: the pairs' sums (at most 8 x 2 x 15 x 127) fit 16 bits for a whole group, so they are added
//    there, and widened once;
//  - 8 bits without it: pairs of 255 * 127 would not fit, so even and odd bytes are taken apart and multiplied as 16 bits,
//    which x is stored as.
// The weight's zero point is taken off a group's sum before it begins: 2^(bits - 1) times the sum of x's values.
#include "cpu/kernels/quantized_linear.h"

#include <atomic>
#include <utility>

#include "cpu/amx.h"
#include "cpu/kernels/bytes.h"
#include "cpu/vnni.h"

namespace pyllm::ISA {
namespace {

#if ISA_AVX512
constexpr int kRows = 6;  // of a tile
#else
constexpr int kRows = 4;
#endif

constexpr int64_t kMostSpan = 8;        // groups
constexpr int64_t kLeastTileRows = 12;  // from which widening a panel for the tile registers pays

enum class Dot { vnni, pairs, halves };

template <int kGroup, class T>
void quantize_row(const T* x, int64_t k, const QuantizedWeight& w, Dot dot, const QuantizedRows& out, int64_t row) {
  alignas(64) float block[kMostSpan * kGroup];
  alignas(64) int8_t block_bytes[kMostSpan * kGroup];
  const int64_t size = w.span * kGroup, part = w.in_units() ? kGroup : size;
  const int offset = w.has_minimums ? 0 : 1 << (w.bits - 1);
  const bool summed = !out.on_tiles || (w.has_minimums && !w.in_units());
  for (int64_t s = 0; s < out.spans; s++) {
    const int64_t count = std::min(size, k - s * size), filled = (count + kGroup - 1) / kGroup * kGroup;
    int8_t* const to = out.values + row * out.bytes + s * (dot == Dot::halves ? 2 * size : size);
    int8_t* const bytes = dot == Dot::halves ? block_bytes : to;
    const auto quantize = [&](const auto* values) {
      V largest{}, bad{};
      for (int64_t j = 0; j < filled; j += W) {
        const V v = load(values + j);
        largest = max(abs(v), largest);
        bad = bad + v * 0.0f;
      }
      const float most = max(largest);
      const V inverse = set(most > 1e-30f ? 127.0f / most : 0.0f);
      const bool finite = !bits(bad != V{});
      for (int64_t j = 0; j < filled; j += W) store_bytes(bytes + j, finite ? load(values + j) * inverse : V{});
      return finite ? most / 127.0f : __builtin_nanf("");
    };
    if (count < size)
      for (int64_t j = 0; j < filled; j += W)
        store(block + j, count > j ? get(x + s * size + j, std::min<int64_t>(W, count - j)) : V{});
    const float scale = count < size ? quantize(block) : quantize(x + s * size);
    const int64_t at = out.at(row, s);
    out.scales[at] = scale;
    for (int64_t begin = 0; begin < filled && summed; begin += part) {
      int32_t total = 0;
      for (int64_t j = begin; j < std::min(filled, begin + part); j++) total += bytes[j];
      const int64_t place = w.in_units() ? row * out.parts + s * w.span + begin / part : at;
      out.sums[place] = static_cast<float>(total) * (w.in_units() ? 1.0f : out.scales[at]);
      out.starts[place] = -offset * total;
    }
    for (int64_t q = 0; dot == Dot::halves && q < filled / 4; q++) {
      const int16_t halves[4] = {bytes[4 * q], bytes[4 * q + 2], bytes[4 * q + 1], bytes[4 * q + 3]};
      std::memcpy(to + 8 * q, halves, 8);
    }
  }
}

// A group's products join whole sums, of R rows by the panel's columns; a: the rows' values from there on.
template <int R, int kBits, int kGroup, Dot kDot>
VEC void add_group(VI (&s)[R][2], const int8_t* const (&a)[R], const char* panel) {
  constexpr int64_t kBytes = W * 4;
  if constexpr (kBits == 4) {
    VI pairs[R][2] = {};
    UNROLL for (int q = 0; q < kGroup / 8; q++) UNROLL for (int j = 0; j < 2; j++) {
      const VI both = load_lanes(panel + (2 * q + j) * kBytes);
      const VI low = both & 0x0f0f0f0f, high = (both >> 4) & 0x0f0f0f0f;
      UNROLL for (int r = 0; r < R; r++) {
        const VI x0 = broadcast_lane(a[r] + 4 * q), x1 = broadcast_lane(a[r] + 4 * q + kGroup / 2);
        if constexpr (kDot == Dot::vnni) {
          s[r][j] = dot_bytes(dot_bytes(s[r][j], low, x0), high, x1);
        } else {
          pairs[r][j] = add_halves(pairs[r][j], add_halves(dot_pairs(low, x0), dot_pairs(high, x1)));
        }
      }
    }
    if constexpr (kDot != Dot::vnni)
      UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < 2; j++) s[r][j] =
          s[r][j] + dot_halves(pairs[r][j], set_int(0x00010001));
  } else {
    for (int q = 0; q < kGroup / 4; q++) UNROLL for (int j = 0; j < 2; j++) {
        const VI bytes = load_lanes(panel + (2 * q + j) * kBytes);
        if constexpr (kDot == Dot::vnni) {
          UNROLL for (int r = 0; r < R; r++) s[r][j] = dot_bytes(s[r][j], bytes, broadcast_lane(a[r] + 4 * q));
        } else {
          const VI even = bytes & 0x00ff00ff, odd = (bytes >> 8) & 0x00ff00ff;
          UNROLL for (int r = 0; r < R; r++) s[r][j] = s[r][j] + dot_halves(even, broadcast_lane(a[r] + 8 * q)) +
                                                       dot_halves(odd, broadcast_lane(a[r] + 8 * q + 4));
        }
      }
  }
}

// R rows from `row` on by one panel, to out (R x kPanel).
template <int R, int kBits, int kGroup, Dot kDot>
void tile(const QuantizedWeight& w, const QuantizedRows& x, int64_t row, const char* panel, float* out) {
  constexpr int64_t kValues = kPanel * kGroup * kBits / 8;
  const int64_t group_bytes = w.group_bytes(kPanel);
  V total[R][2] = {};
  const int8_t* a[R];
  UNROLL for (int r = 0; r < R; r++) a[r] = x.values + (row + r) * x.bytes;
  const int64_t first = row * x.spans;
  for (int64_t span = 0, left = w.groups; span < x.spans; span++, left -= w.span) {
    VI s[R][2];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < 2; j++) s[r][j] =
        set_int(x.starts[first + r * x.spans + span]);
    for (int64_t g = 0; g < std::min(w.span, left); g++, panel += group_bytes) {
      add_group<R, kBits, kGroup, kDot>(s, a, panel);
      UNROLL for (int r = 0; r < R; r++) a[r] += kDot == Dot::halves ? 2 * kGroup : kGroup;
    }
    const char* scales = panel - group_bytes + kValues;
    UNROLL for (int j = 0; j < 2; j++) {
      const V scale = load_scale(scales, w.scale_dtype, j * W);
      UNROLL for (int r = 0; r < R; r++) total[r][j] =
          fma(__builtin_convertvector(s[r][j], V), scale * x.scales[first + r * x.spans + span], total[r][j]);
      if (w.has_minimums) {
        const V minimum = load_scale(scales, w.scale_dtype, kPanel + j * W);
        UNROLL for (int r = 0; r < R; r++) total[r][j] =
            fma(minimum, set(x.sums[first + r * x.spans + span]), total[r][j]);
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < 2; j++) store(out + r * kPanel + j * W, total[r][j]);
}

// The same for a weight in units: a span's sum is exact in fp32, a whole number of units below 2^24, in any order.
template <int R, int kBits, int kGroup, Dot kDot>
void tile_in_units(const QuantizedWeight& w, const QuantizedRows& x, int64_t row, const char* panel, float* out) {
  constexpr int64_t kValues = kPanel * kGroup * kBits / 8;
  const int64_t group_bytes = w.group_bytes(kPanel);
  V total[R][2] = {};
  const int8_t* a[R];
  UNROLL for (int r = 0; r < R; r++) a[r] = x.values + (row + r) * x.bytes;
  for (int64_t span = 0; span < x.spans; span++) {
    V exact[R][2] = {};
    for (int64_t g = span * w.span; g < std::min((span + 1) * w.span, w.groups); g++, panel += group_bytes) {
      VI s[R][2];
      UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < 2; j++) s[r][j] =
          set_int(x.starts[(row + r) * x.parts + g]);
      add_group<R, kBits, kGroup, kDot>(s, a, panel);
      UNROLL for (int r = 0; r < R; r++) a[r] += kGroup;
      UNROLL for (int j = 0; j < 2; j++) {
        const V scale = load_scale(panel + kValues, w.scale_dtype, j * W);
        UNROLL for (int r = 0; r < R; r++) exact[r][j] = fma(__builtin_convertvector(s[r][j], V), scale, exact[r][j]);
        if (w.has_minimums) {
          const V minimum = load_scale(panel + kValues, w.scale_dtype, kPanel + j * W);
          UNROLL for (int r = 0; r < R; r++) exact[r][j] =
              fma(minimum, set(x.sums[(row + r) * x.parts + g]), exact[r][j]);
        }
      }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < 2; j++) total[r][j] =
        fma(exact[r][j], set(x.scales[(row + r) * x.spans + span]), total[r][j]);
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < 2; j++) store(out + r * kPanel + j * W, total[r][j]);
}

using Tile = void (*)(const QuantizedWeight&, const QuantizedRows&, int64_t, const char*, float*);

// The tile of so many rows.
template <int kBits, int kGroup, Dot kDot>
Tile tile_of(const QuantizedWeight& w, int64_t rows) {
  const auto choose = [&]<int... R>(std::integer_sequence<int, R...>) {
    static constexpr Tile plain[] = {tile<R + 1, kBits, kGroup, kDot>...};
    if constexpr (kBits == 4) {
      static constexpr Tile in_units[] = {tile_in_units<R + 1, kBits, kGroup, kDot>...};
      if (w.in_units()) return in_units[rows - 1];
    }
    return plain[rows - 1];
  };
  return choose(std::make_integer_sequence<int, kRows>());
}

template <int kBits, int kGroup, Dot kDot>
void run(const QuantizedLinearArgs& p) {
  const QuantizedWeight& w = p.weight;
  const bool on_tiles = kDot == Dot::vnni && p.m >= kLeastTileRows && cpu::has_amx();
  const int64_t spans = (w.groups + w.span - 1) / w.span, parts = w.in_units() ? w.groups : spans;
  const int64_t m = round_up(p.m, tile_rows(w)), scale_count = m * spans, count = m * parts;
  // Tiles of larger groups read 64 values at once.
  const int64_t row_bytes = round_up(w.groups, w.span > 1 ? 2 : 1) * (kDot == Dot::halves ? 2 : 1) * kGroup;
  const int64_t values = round_up(m * row_bytes, 64);
  auto* memory = static_cast<char*>(cpu::scratch(values + 4 * scale_count + 8 * count, 0));
  auto* scales = reinterpret_cast<float*>(memory + values);
  const QuantizedRows x = {spans,
                           parts,
                           row_bytes,
                           reinterpret_cast<int8_t*>(memory),
                           scales,
                           scales + scale_count,
                           reinterpret_cast<int32_t*>(scales + scale_count + count),
                           on_tiles};
  with_dtype(p.dtype, [&](auto* tag) {
    const auto* a = reinterpret_cast<decltype(tag)>(const_cast<char*>(p.a));
    const auto quantize = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) quantize_row<kGroup>(a + i * p.a_row, p.k, w, kDot, x, i);
    };
    p.m* p.k < 1 << 15 ? quantize(0, p.m) : parallel_for(p.m, 8, quantize);
  });

  if (on_tiles) return quantized_linear_on_tiles(p, x);
  const int64_t panels = (w.n + kPanel - 1) / kPanel, panel_bytes = w.groups * w.group_bytes(kPanel);
  const int64_t height = std::max<int64_t>(1, (3 << 16) / (row_bytes + 4 * spans + 8 * parts + 1) / kRows) * kRows;
  const int64_t pieces = p.m * panels * panel_bytes < 1 << 16 ? 1 : 4 * cpu::num_threads();
  parallel_for(panels, std::max<int64_t>(1, (panels + pieces - 1) / pieces), [&](int64_t begin, int64_t end) {
    for (int64_t i0 = 0; i0 < p.m; i0 += height)
      for (int64_t panel = begin; panel < end; panel++)
        for (int64_t i = i0, i1 = std::min(i0 + height, p.m); i < i1; i += kRows) {
          alignas(64) float sums[kRows * kPanel];
          const int64_t rows = std::min<int64_t>(kRows, i1 - i);
          tile_of<kBits, kGroup, kDot>(w, rows)(w, x, i, p.panels + panel * panel_bytes, sums);
          write_sums(p, sums, i, rows, panel * kPanel);
        }
  });
}

template <int kBits, int kGroup, Dot kPlain>
void run_with_best(const QuantizedLinearArgs& p) {
#if !ISA_BASELINE
  if (cpu::has_vnni()) return run<kBits, kGroup, Dot::vnni>(p);
#endif
  run<kBits, kGroup, kPlain>(p);
}

}  // namespace

void quantized_linear(const QuantizedLinearArgs& p) {
  if (p.m == 0 || p.weight.n == 0) return;
  if (p.weight.bits == 4) return run_with_best<4, 32, Dot::pairs>(p);
  p.weight.group == 16 ? run_with_best<8, 16, Dot::halves>(p) : run_with_best<8, 32, Dot::halves>(p);
}

void pack_quantized(const PackQuantizedArgs& p) {
  const QuantizedWeight& w = p.weight;
  if (w.groups == 0) return;
  const int64_t row_bytes = w.groups * w.value_bytes(), group_bytes = w.group_bytes(kPanel);
  const int64_t quads = w.value_bytes() / 4, size = w.scale_bytes();
  parallel_for((w.n + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; panel++) {
      const int64_t j0 = panel * kPanel, columns = std::min(kPanel, w.n - j0);
      char* out = p.panels + panel * w.groups * group_bytes;
      std::memset(out, 0, w.groups * group_bytes);
      for (int64_t j = 0; j < columns; j++) {
        const uint8_t* values = p.values + (j0 + j) * row_bytes;
        for (int64_t g = 0; g < w.groups; g++, values += w.value_bytes()) {
          char* group = out + g * group_bytes;
          for (int64_t q = 0; q < quads; q++) {
            uint8_t lane[4];
            for (int64_t b = 0; b < 4; b++) {
              if (w.bits == 8) {
                lane[b] = values[4 * q + b];
              } else {  // a byte holds element i of the group's first half in its low bits, of its second in its high ones
                const int64_t i = 4 * q + b, odd = i % 2 * 4;
                lane[b] = ((values[i / 2] >> odd) & 15) | (((values[w.group / 4 + i / 2] >> odd) & 15) << 4);
              }
            }
            std::memcpy(group + (q * kPanel + j) * 4, lane, 4);
          }
          char* scale = group + quads * kPanel * 4 + j * size;
          const int64_t at = ((j0 + j) * w.groups + g) * size;
          std::memcpy(scale, p.scales + at, size);
          if (w.has_minimums) std::memcpy(scale + kPanel * size, p.minimums + at, size);
        }
      }
    }
  });
}

void check_units(const CheckUnitsArgs& p) {
  const QuantizedWeight& w = p.weight;
  const int64_t group_bytes = w.group_bytes(kPanel), spans = (w.groups + w.span - 1) / w.span;
  std::atomic<bool> whole{true};
  parallel_for((w.n + kPanel - 1) / kPanel, 4096 / (w.groups + 1) + 1, [&](int64_t begin, int64_t end) {
    VI bad{};
    for (int64_t i = begin * spans; i < end * spans; i++) {
      const int64_t first = i % spans * w.span, count = std::min(w.span, w.groups - first);
      for (int64_t at = 0; at < kPanel; at += W) {
        const char* group = p.panels + (i / spans * w.groups + first) * group_bytes;
        const Units unit = units_of(w, group, count, at);
        for (int64_t g = 0; g < count; g++, group += group_bytes) {
          const char* scales = group + w.value_bytes() * kPanel;
          bad |= ~(reach_of(w, scales, at) < 1e30f);  // neither is what is not finite
          for (int64_t part = 0; part < (w.has_minimums ? 2 : 1); part++) {
            const V multiple = load_scale(scales, w.scale_dtype, part * kPanel + at) * unit.inverse;
            bad |= multiple != __builtin_convertvector(__builtin_convertvector(multiple, VI), V);
          }
        }
      }
    }
    if (bits(bad)) whole.store(false, std::memory_order_relaxed);
  });
  *p.whole = whole.load();
}

}  // namespace pyllm::ISA

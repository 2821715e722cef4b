// A row of x is quantised once; then a tile, some rows of x by a panel of 2W of the weight's, goes down k span by span
// (a span is a group, or some that share a scale or a unit). Within a span everything is whole numbers: the sums are exact,
// so that instruction sets with and without a dot product of bytes agree. A span adds float(sum) * (scale of x * scale of
// the weight) to the tile's fp32 sums; of a weight in units, (float(sum) * unit) * scale of x, where the first is exact.
// Threads take panels, and panels pass by as many rows of x as stay in the second-level cache. With VNNI, a panel of 4 bits
// is widened to 8 for many rows; in units, a span's elements are whole numbers then.
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
#include "cpu/kernels/quantized_linear_units.h"
#include "cpu/vnni.h"

namespace pyllm::ISA {
namespace {

constexpr int64_t kMostSpan = 8;        // groups
constexpr int64_t kLeastTileRows = 12;  // from which widening a panel for the tile registers pays
constexpr int64_t kLeastWideRows = 24;  // from which widening one to bytes does
constexpr int64_t kStretchBytes = 36 << 10, kBlocksBytes = 3 << 17;  // of a panel, and of x, that stay in caches

// How many groups before it is read a panel is asked for, for a few rows: early by the second-level cache, which has more
// requests under way than the first-level one.
constexpr int64_t kAhead = 4, kFarAhead = 32;

enum class Dot { vnni, pairs, halves };

// Rows of a tile at most: of all there are, where their fp32 sums wait in memory while whole ones are in registers, and of a
// block of more, which has both there.
#if ISA_AVX512
constexpr int most_rows(Dot dot) { return dot == Dot::vnni ? 8 : 6; }
#else
constexpr int most_rows(Dot dot) { return dot == Dot::vnni ? 6 : 4; }
#endif
constexpr int block_rows(Dot dot) { return std::min(most_rows(dot), 6); }

template <int kGroup, class T>
void quantize_row(const T* x, int64_t k, const QuantizedWeight& w, Dot dot, const QuantizedRows& out, int64_t row) {
  alignas(64) float block[kMostSpan * kGroup];
  alignas(64) int8_t bytes[kMostSpan * kGroup];
  const int64_t size = w.span * kGroup, part = out.parts == out.spans ? size : kGroup;
  const bool summed = !out.on_tiles || (w.has_minimums && !w.in_units());
  const int64_t in_block = out.on_tiles ? row / kTileRows : out.blocks.of(row);
  const int64_t first = out.on_tiles ? in_block * kTileRows : out.blocks.first(in_block);
  const int64_t rows = out.on_tiles ? kTileRows : out.blocks.rows(in_block), quad_bytes = dot == Dot::halves ? 8 : 4;
  int8_t* to =
      out.on_tiles ? out.values + row * out.bytes : out.values + first * out.bytes + (row - first) * quad_bytes;
  float* const scales = out.scales + first * out.spans + row - first;
  float* sums = out.sums + first * out.parts + row - first;
  int32_t* starts = out.starts + first * out.parts + row - first;
  for (int64_t s = 0; s < out.spans; s++) {
    const int64_t count = std::min(size, k - s * size), filled = (count + kGroup - 1) / kGroup * kGroup;
    int8_t* const whole = out.on_tiles || (rows == 1 && quad_bytes == 4) ? to : bytes;
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
      const float scale = finite ? most / 127.0f : __builtin_nanf("");
      scales[s * rows] = scale;
      for (int64_t begin = 0; begin < filled; begin += part) {
        VI total{};
        for (int64_t j = begin; j < std::min(filled, begin + part); j += W) {
          const VI v = nearest(finite ? load(values + j) * inverse : V{});
          store_bytes(whole + j, v);
          total += v;
        }
        if (!summed) continue;
        const float in_all = sum(__builtin_convertvector(total, V));  // exact
        *sums = in_all * (w.in_units() ? 1.0f : scale);
        *starts = -out.zero * static_cast<int32_t>(in_all);
        sums += rows, starts += rows;
      }
    };
    if (count < size)
      for (int64_t j = 0; j < filled; j += W)
        store(block + j, count > j ? get(x + s * size + j, std::min<int64_t>(W, count - j)) : V{});
    count < size ? quantize(block) : quantize(x + s * size);
    if (whole == to) {
      to += size;
      continue;
    }
    for (int64_t q = 0; q < filled / 4; q++, to += rows * quad_bytes) {
      if (dot == Dot::halves) {
        const int16_t halves[4] = {bytes[4 * q], bytes[4 * q + 2], bytes[4 * q + 1], bytes[4 * q + 3]};
        std::memcpy(to, halves, 8);
      } else {
        std::memcpy(to, bytes + 4 * q, 4);
      }
    }
  }
}

// What lies ahead of a place in a panel is asked for, a line at a time between products: they would wait for each other. For
// one row, which asks for lines as fast as they come, a fourth of the far ones makes the processor ask for the others. (Not
// from a lambda, which the compiler leaves out.)
template <int R, bool kAsk>
VEC void ask_ahead(const char* panel, int64_t byte, int64_t group_bytes) {
  if (!kAsk || byte % 64) return;
  __builtin_prefetch(panel + byte + kAhead * group_bytes);
  if (R > 1 || byte % 256 == 0) __builtin_prefetch(panel + byte + kFarAhead * group_bytes, 0, 2);
}

// A group's products join whole sums, of R rows by the panel's columns; a: the rows' values from there on. kAsk: what lies
// ahead is asked for meanwhile.
template <int R, int kBits, int kGroup, Dot kDot, bool kAsk>
VEC void add_group(VI (&s)[R][2], const int8_t* a, const char* panel, int64_t group_bytes) {
  constexpr int64_t kBytes = W * 4;
  if constexpr (kBits == 4) {
    constexpr int64_t kHalf = kGroup / 2 * R;
    VI pairs[R][2] = {};
    UNROLL for (int q = 0; q < kGroup / 8; q++) UNROLL for (int j = 0; j < 2; j++) {
      const VI both = load_lanes(panel + (2 * q + j) * kBytes);
      const VI low = both & 0x0f0f0f0f, high = (both >> 4) & 0x0f0f0f0f;
      ask_ahead<R, kAsk>(panel, (2 * q + j) * kBytes, group_bytes);
      UNROLL for (int r = 0; r < R; r++) {
        const VI x0 = broadcast_lane(a + (q * R + r) * 4), x1 = broadcast_lane(a + (q * R + r) * 4 + kHalf);
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
  } else if constexpr (kDot == Dot::vnni) {
    UNROLL for (int q = 0; q < kGroup / 4; q++) {
      const VI bytes[2] = {load_lanes(panel + 2 * q * kBytes), load_lanes(panel + (2 * q + 1) * kBytes)};
      ask_ahead<R, kAsk>(panel, 2 * q * kBytes, group_bytes);
      UNROLL for (int r = 0; r < R; r++) {
        const VI x = broadcast_lane(a + (q * R + r) * 4);
        UNROLL for (int j = 0; j < 2; j++) s[r][j] = dot_bytes(s[r][j], bytes[j], x);
        if (r == R / 2) ask_ahead<R, kAsk>(panel, (2 * q + 1) * kBytes, group_bytes);
      }
    }
  } else {
    for (int q = 0; q < kGroup / 4; q++) UNROLL for (int j = 0; j < 2; j++) {
        const VI bytes = load_lanes(panel + (2 * q + j) * kBytes);
        ask_ahead<R, kAsk>(panel, (2 * q + j) * kBytes, group_bytes);
        const VI even = bytes & 0x00ff00ff, odd = (bytes >> 8) & 0x00ff00ff;
        UNROLL for (int r = 0; r < R; r++) {
          const int8_t* x = a + (q * R + r) * 8;
          s[r][j] = s[r][j] + dot_halves(even, broadcast_lane(x)) + dot_halves(odd, broadcast_lane(x + 4));
        }
      }
  }
}

// Neighbouring groups of a panel, whole spans of them: as many as stay in the first-level cache while rows pass by.
struct Stretch {
  int64_t first, groups, first_span;
  const char* panel;  // from there on
  // For one of several blocks: what it asks for of the next stretch, a few lines at a time.
  const char *next, *next_end;
  int64_t next_step;  // bytes, a span
};

// To out (R x kPanel), the fp32 sums.
template <int R>
VEC void store_totals(const V (&total)[R][2], float* out) {
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < 2; j++) store(out + r * kPanel + j * W, total[r][j]);
}
template <int R>
VEC void load_totals(const float* out, bool first, V (&total)[R][2]) {
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < 2; j++) total[r][j] =
      first ? V{} : load(out + r * kPanel + j * W);
}

// R rows from `row` on by a stretch of a panel, to out (R x kPanel). kAsk: they are all there are; kUnits: the panel's scales
// are units.
template <int R, int kBits, int kGroup, Dot kDot, bool kAsk, bool kUnits = false>
void tile(const QuantizedWeight& w, const QuantizedRows& x, int64_t row, const Stretch& stretch, float* out) {
  constexpr int64_t kValues = kPanel * kGroup * kBits / 8, kStep = kGroup * R * (kDot == Dot::halves ? 2 : 1);
  const int64_t group_bytes = w.group_bytes(kPanel);
  const char* panel = stretch.panel;
  const int64_t at = row * x.spans + stretch.first_span * R;
  const int8_t* a = x.values + row * x.bytes + stretch.first * kStep;
  const float *x_scales = x.scales + at, *sums = x.sums + at;
  const int32_t* starts = x.starts + at;
  V total[R][2];
  load_totals(out, stretch.first == 0, total);
  const char* next = stretch.next;
  for (int64_t left = stretch.groups; left > 0; left -= w.span) {
    VI s[R][2];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < 2; j++) s[r][j] = set_int(starts[r]);
    for (int64_t g = 0; g < std::min(w.span, left); g++, panel += group_bytes, a += kStep)
      add_group<R, kBits, kGroup, kDot, kAsk>(s, a, panel, group_bytes);
    if (!kAsk)
      for (const char* to = std::min(next + stretch.next_step, stretch.next_end); next < to; next += 64)
        __builtin_prefetch(next, 0, 2);
    const char* scales = panel - group_bytes + kValues;
    ask_ahead<R, kAsk>(scales, 0, group_bytes);
    UNROLL for (int j = 0; j < 2; j++) {
      const V scale = load_scale(scales, w.scale_dtype, j * W);
      UNROLL for (int r = 0; r < R; r++) {
        const V sum = __builtin_convertvector(s[r][j], V);
        total[r][j] =
            kUnits ? fma(sum * scale, set(x_scales[r]), total[r][j]) : fma(sum, scale * x_scales[r], total[r][j]);
      }
      if (w.has_minimums) {
        const V minimum = load_scale(scales, w.scale_dtype, kPanel + j * W);
        UNROLL for (int r = 0; r < R; r++) total[r][j] = fma(minimum, set(sums[r]), total[r][j]);
      }
    }
    starts += R, sums += R, x_scales += R;
  }
  store_totals(total, out);
}

// The same for a weight in units: a span's sum is exact in fp32, a whole number of units below 2^24, in any order.
template <int R, int kBits, int kGroup, Dot kDot, bool kAsk>
void tile_in_units(const QuantizedWeight& w, const QuantizedRows& x, int64_t row, const Stretch& stretch, float* out) {
  constexpr int64_t kValues = kPanel * kGroup * kBits / 8;
  const int64_t group_bytes = w.group_bytes(kPanel);
  const char* panel = stretch.panel;
  const int64_t at = row * x.parts + stretch.first * R;
  const int8_t* a = x.values + row * x.bytes + stretch.first * kGroup * R;
  const float *x_scales = x.scales + row * x.spans + stretch.first_span * R, *sums = x.sums + at;
  const int32_t* starts = x.starts + at;
  V total[R][2];
  load_totals(out, stretch.first == 0, total);
  for (int64_t left = stretch.groups; left > 0; left -= w.span) {
    V exact[R][2] = {};
    for (int64_t g = 0; g < std::min(w.span, left); g++) {
      VI s[R][2];
      UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < 2; j++) s[r][j] = set_int(starts[r]);
      add_group<R, kBits, kGroup, kDot, kAsk>(s, a, panel, group_bytes);
      ask_ahead<R, kAsk>(panel, kValues, group_bytes);
      UNROLL for (int j = 0; j < 2; j++) {
        const V scale = load_scale(panel + kValues, w.scale_dtype, j * W);
        UNROLL for (int r = 0; r < R; r++) exact[r][j] = fma(__builtin_convertvector(s[r][j], V), scale, exact[r][j]);
        if (w.has_minimums) {
          const V minimum = load_scale(panel + kValues, w.scale_dtype, kPanel + j * W);
          UNROLL for (int r = 0; r < R; r++) exact[r][j] = fma(minimum, set(sums[r]), exact[r][j]);
        }
      }
      panel += group_bytes, a += kGroup * R, starts += R, sums += R;
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < 2; j++) total[r][j] =
        fma(exact[r][j], set(x_scales[r]), total[r][j]);
    x_scales += R;
  }
  store_totals(total, out);
}

// So many groups of a panel of 4 bits to one of `wide`'s, of 8.
void widen(const QuantizedWeight& w, const QuantizedWeight& wide, int64_t groups, const char* panel, char* out) {
  constexpr int64_t kHalf = W * 4;
  const int64_t group_bytes = wide.group_bytes(kPanel), values = wide.value_bytes() * kPanel,
                quads = w.value_bytes() / 4;
  const auto place = [&](int64_t g, int64_t quad, int64_t half) {
    return out + g * group_bytes + (2 * quad + half) * kHalf;
  };
  const auto put_scales = [&](int64_t g, int64_t at, V v) {
    store(reinterpret_cast<float*>(out + g * group_bytes + values) + at, v);
  };
  if (w.in_units())
    return widen_in_units(w, groups, panel, wide.zero(), place, [&](int64_t g, int64_t half, V unit) {
      put_scales(std::min(g + w.span, groups) - 1, half * W, unit);
    });
  for (int64_t g = 0; g < groups; g++, panel += w.group_bytes(kPanel)) {
    for (int64_t q = 0; q < quads; q++)
      for (int64_t half = 0; half < 2; half++) {
        const VI both = load_lanes(panel + (2 * q + half) * kHalf), low = both & 0x0f0f0f0f,
                 high = (both >> 4) & 0x0f0f0f0f;
        std::memcpy(place(g, q, half), &low, sizeof low);
        std::memcpy(place(g, quads + q, half), &high, sizeof high);
      }
    for (int64_t at = 0; at < kPanel * (w.has_minimums ? 2 : 1); at += W)
      put_scales(g, at, load_scale(panel + quads * kPanel * 4, w.scale_dtype, at));
  }
}

using Tile = void (*)(const QuantizedWeight&, const QuantizedRows&, int64_t, const Stretch&, float*);

// The tile of so many rows, which are all there are or a block of more.
template <int kBits, int kGroup, Dot kDot, bool kAll>
Tile tile_of(bool units, int64_t rows) {
  const auto choose = [&]<int... R>(std::integer_sequence<int, R...>) {
    static constexpr Tile plain[] = {tile<R + 1, kBits, kGroup, kDot, kAll>...};
    if constexpr (kBits == 4) {
      static constexpr Tile in_units[] = {tile_in_units<R + 1, kBits, kGroup, kDot, kAll>...};
      if (units) return in_units[rows - 1];
    } else if constexpr (kGroup == 32 && kDot == Dot::vnni && !kAll) {
      static constexpr Tile in_units[] = {tile<R + 1, kBits, kGroup, kDot, false, true>...};
      if (units) return in_units[rows - 1];
    }
    return plain[rows - 1];
  };
  return choose(std::make_integer_sequence<int, kAll ? most_rows(kDot) : block_rows(kDot)>());
}

// All blocks of rows by all panels. `wide`: as which weight panels are widened, if they are.
template <int kBits, int kGroup, Dot kDot>
void multiply(const QuantizedLinearArgs& p, const QuantizedRows& x, const QuantizedWeight* wide) {
  constexpr int64_t kMost = most_rows(kDot);
  const QuantizedWeight& w = p.weight;
  const int64_t panels = (w.n + kPanel - 1) / kPanel, group_bytes = w.group_bytes(kPanel);
  const char* const end_of_panels = p.panels + panels * w.groups * group_bytes;
  const int64_t row_bytes = x.bytes + 4 * x.spans + 8 * x.parts;
  const int64_t height = std::max<int64_t>(1, kBlocksBytes / (row_bytes + 1) / x.blocks.rows(0));  // in blocks
  const int64_t in_cache = kStretchBytes / group_bytes / w.span * w.span;
  const int64_t most_groups = x.blocks.count == 1 ? w.groups : std::min(in_cache, w.groups);
  // Pieces of panels and, where these are few, of blocks, so that threads get as much to do.
  const bool few = p.m * panels * w.groups * group_bytes < 1 << 16;
  const int64_t wanted = few ? 1 : 4 * cpu::num_threads(), across = std::min(panels, wanted);
  const int64_t down = std::clamp<int64_t>(2 * wanted / panels, 1, (x.blocks.count + 7) / 8);
  parallel_for(across * down, 1, [&](int64_t begin, int64_t end) {
    const int64_t sums_rows = most_groups < w.groups ? std::min(p.m, height * kMost) : kMost;
    const int64_t sums_bytes = sums_rows * kPanel * static_cast<int64_t>(sizeof(float));
    auto* sums =
        static_cast<float*>(cpu::scratch(sums_bytes + (wide ? most_groups * wide->group_bytes(kPanel) : 0), 1));
    auto* bytes = reinterpret_cast<char*>(sums) + sums_bytes;
    const auto pass_by = [&](int64_t block0, int64_t blocks, int64_t j, int64_t g) {
      const int64_t groups = std::min(most_groups, w.groups - g);
      const char* const panel = p.panels + (j * w.groups + g) * group_bytes;
      const char *next = panel + groups * group_bytes, *next_end = std::min(next + groups * group_bytes, end_of_panels);
      Stretch stretch = {g, groups, g / w.span, panel, next, next, 0};
      const int64_t share = blocks > 1 ? (next_end - next) / blocks + 1 : 0;
      stretch.next_step = round_up(share * w.span / (groups + 1) + 1, 64);
      if (wide) widen(w, *wide, groups, panel, bytes), stretch.panel = bytes;
      for (int64_t i = 0; i < blocks; i++) {
        const int64_t row = x.blocks.first(block0 + i), rows = x.blocks.rows(block0 + i);
        float* out = sums + (sums_rows > kMost ? row - x.blocks.first(block0) : 0) * kPanel;
        stretch.next = next + share * i, stretch.next_end = std::min(stretch.next + share, next_end);
        if (wide)
          tile_of<8, kGroup, kDot, false>(w.in_units(), rows)(*wide, x, row, stretch, out);
        else if (x.blocks.count > 1)
          tile_of<kBits, kGroup, kDot, false>(w.in_units(), rows)(w, x, row, stretch, out);
        else
          tile_of<kBits, kGroup, kDot, true>(w.in_units(), rows)(w, x, row, stretch, out);
        if (g + groups == w.groups) write_sums(p, out, row, rows, j * kPanel);
      }
    };
    for (int64_t piece = begin; piece < end; piece++) {
      const int64_t i = piece % down, block1 = x.blocks.count * (i + 1) / down;
      for (int64_t block = x.blocks.count * i / down; block < block1; block += height)
        for (int64_t j = panels * (piece / down) / across; j < panels * (piece / down + 1) / across; j++) {
          int64_t g = 0;
          do pass_by(block, std::min(height, block1 - block), j, g);
          while ((g += most_groups) < w.groups);
        }
    }
  });
}

template <int kBits, int kGroup, Dot kDot>
void run(const QuantizedLinearArgs& p) {
  const QuantizedWeight& w = p.weight;
  const bool on_tiles = kDot == Dot::vnni && p.m >= kLeastTileRows && cpu::has_amx();
  const bool widened = kDot == Dot::vnni && kBits == 4 && p.m >= kLeastWideRows && !on_tiles;
  const QuantizedWeight wide = {w.n, w.groups, w.group, w.span, 8, DType::f32, w.has_minimums && !w.in_units()};
  const int64_t spans = (w.groups + w.span - 1) / w.span, parts = w.in_units() && !widened ? w.groups : spans;
  const int64_t m = round_up(p.m, tile_rows(w)), scale_count = m * spans, count = m * parts;
  // Tiles of larger groups read 64 values at once.
  const int64_t row_bytes = round_up(w.groups, w.span > 1 ? 2 : 1) * (kDot == Dot::halves ? 2 : 1) * kGroup;
  const int64_t values = round_up(m * row_bytes, 64);
  auto* memory = static_cast<char*>(cpu::scratch(values + 4 * scale_count + 8 * count, 0));
  auto* scales = reinterpret_cast<float*>(memory + values);
  const QuantizedRows x = {spans,
                           parts,
                           row_bytes,
                           widened && w.in_units() ? wide.zero() : w.zero(),
                           reinterpret_cast<int8_t*>(memory),
                           scales,
                           scales + scale_count,
                           reinterpret_cast<int32_t*>(scales + scale_count + count),
                           {p.m, p.m > most_rows(kDot) ? block_rows(kDot) : most_rows(kDot)},
                           on_tiles};
  with_dtype(p.dtype, [&](auto* tag) {
    const auto* a = reinterpret_cast<decltype(tag)>(const_cast<char*>(p.a));
    const auto quantize = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) quantize_row<kGroup>(a + i * p.a_row, p.k, w, kDot, x, i);
    };
    p.m* p.k < 1 << 15 ? quantize(0, p.m) : parallel_for(p.m, 8, quantize);
  });
  on_tiles ? quantized_linear_on_tiles(p, x) : multiply<kBits, kGroup, kDot>(p, x, widened ? &wide : nullptr);
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

namespace {

// Four halves of bytes, low ones first, to bytes.
uint32_t spread(const uint8_t* two) {
  uint16_t halves;
  std::memcpy(&halves, two, 2);
  uint32_t x = halves;
  x = (x | x << 8) & 0x00ff00ff;
  return (x | x << 4) & 0x0f0f0f0f;
}

// A group of a row, quad by quad, to its column of a panel.
template <int kBits>
void pack_group(const uint8_t* values, int64_t quads, char* column) {
  for (int64_t q = 0; q < quads; q++, column += kPanel * 4) {
    if constexpr (kBits == 8) {
      std::memcpy(column, values + 4 * q, 4);
    } else {  // a byte holds element i of the group's first half in its low bits, of its second in its high ones
      const uint32_t quad = spread(values + 2 * q) | spread(values + 2 * (quads + q)) << 4;
      std::memcpy(column, &quad, 4);
    }
  }
}

}  // namespace

void pack_quantized(const PackQuantizedArgs& p) {
  const QuantizedWeight& w = p.weight;
  if (w.groups == 0) return;
  const int64_t value_bytes = w.value_bytes(), row_bytes = w.groups * value_bytes, group_bytes = w.group_bytes(kPanel);
  const int64_t quads = value_bytes / 4, size = w.scale_bytes();
  parallel_for((w.n + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; panel++) {
      const int64_t j0 = panel * kPanel, columns = std::min(kPanel, w.n - j0);
      char* out = p.panels + panel * w.groups * group_bytes;
      if (columns < kPanel) std::memset(out, 0, w.groups * group_bytes);
      for (int64_t g = 0; g < w.groups; g++, out += group_bytes) {
        const uint8_t* values = p.values + j0 * row_bytes + g * value_bytes;
        for (int64_t j = 0; j < columns; j++, values += row_bytes)
          (w.bits == 8 ? pack_group<8> : pack_group<4>)(values, quads, out + j * 4);
        char* scales = out + value_bytes * kPanel;
        for (int64_t j = 0; j < columns; j++) {
          const int64_t at = ((j0 + j) * w.groups + g) * size;
          std::memcpy(scales + j * size, p.scales + at, size);
          if (w.has_minimums) std::memcpy(scales + (kPanel + j) * size, p.minimums + at, size);
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

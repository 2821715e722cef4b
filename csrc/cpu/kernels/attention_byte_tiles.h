// Attention, forward, of many rows over int8 pages on the tile registers: the bits of kernels/attention_bytes.h, as whole
// numbers add up to the same in any order and all else is added in the order of one row.
//
// Rows lie across the lanes, as in panels: scores are [key][lane], left factors being keys, transposed once for all rows of
// a tile, and right ones queries, a plane of bytes each. So a key's scale is one number, maxima and sums run down the
// lanes, and weights of four keys become a right factor with a few shifts. A row takes half of the time that it takes by
// dot products; two fifths of what is left are exponentials and the whole numbers that weights become.
#pragma once
#include "cpu/amx.h"
#include "cpu/kernels/attention_bytes.h"
#include "cpu/kernels/tiles.h"

namespace pyllm::ISA {
namespace {

#if ISA_AVX512

bool takes_byte_tiles(const AttentionArgs& a) {
  return takes_bytes(a) && cpu::has_amx() && a.queries * (a.heads / a.kv_heads) >= W;
}

constexpr int64_t kGroupQuads = kInt8Group / kInt8Quad;  // rows of a right factor of queries
constexpr int64_t kGroupBytes = kGroupQuads * 64, kGroupPairBytes = kInt8Group * 2;

struct ByteTileBuffers {   // of tiles
  float* query_scales;     // [side][group][lane]
  char* queries;           // [side][group][plane]
  ByteBuffers rows;        // of a side, before they are a right factor
  char* keys;              // [key tile][pair of groups]
  char* values;            // [tile of W elements]
  char* weights;           // [group][plane]
  int32_t* whole;          // [of two][plane]: of products
  float *scores, *scales;  // [key][lane], and [group][key] of keys and then of values
};

int64_t group_pairs(const AttentionArgs& a) { return (byte_groups(a.dim) + 1) / 2; }

int64_t byte_tile_query_bytes(const AttentionArgs& a, int64_t rows) {
  return (rows + W - 1) / W * byte_groups(a.dim) * (W * 4 + 2 * kGroupBytes) + byte_query_bytes(a, W);
}
int64_t byte_tile_buffer_bytes(const AttentionArgs& a) {  // without the queries
  return kSides * group_pairs(a) * kTileBytes + kKeys * a.value_dim + byte_groups(a.value_dim) * 2 * kTileBytes +
         4 * kTileBytes + kKeys * kLanes * 4 + (byte_groups(a.dim) + byte_groups(a.value_dim)) * kKeys * 4;
}
ByteTileBuffers byte_tile_buffers_at(const AttentionArgs& a, char* queries, int64_t rows, char* rest) {
  const int64_t sides = (rows + W - 1) / W, groups = byte_groups(a.dim), value_groups = byte_groups(a.value_dim);
  ByteTileBuffers w;
  w.query_scales = reinterpret_cast<float*>(queries);
  w.queries = reinterpret_cast<char*>(w.query_scales + sides * groups * W);
  w.rows = byte_buffers_at(a, w.queries + sides * groups * 2 * kGroupBytes, W, nullptr);
  w.keys = rest;
  w.values = w.keys + kSides * group_pairs(a) * kTileBytes;
  w.weights = w.values + kKeys * a.value_dim;
  w.whole = reinterpret_cast<int32_t*>(w.weights + value_groups * 2 * kTileBytes);
  w.scores = reinterpret_cast<float*>(w.whole + 4 * W * W);
  w.scales = w.scores + kKeys * kLanes;
  return w;
}

// Panel i's rows, of which row_of(lane) are the elements, as right factors; those beyond the last are zeros.
template <class F>
void pack_byte_tile_queries(const AttentionArgs& a, const Panel& p, int64_t i, const ByteTileBuffers& w,
                            const F& row_of) {
  const int64_t groups = byte_groups(a.dim);
  for (int64_t v = 0; v < p.vectors; v++) {
    const int64_t side = 2 * i + v, count = std::min<int64_t>(W, p.count - v * W);
    float* scales = w.query_scales + side * groups * W;
    char* planes = w.queries + side * groups * 2 * kGroupBytes;
    std::fill_n(scales, groups * W, 0.0f);
    std::memset(planes, 0, groups * 2 * kGroupBytes);
    for (int64_t l = 0; l < count; l++) {
      pack_byte_query(a, row_of(v * W + l), l, w.rows);
      for (int64_t g = 0; g < groups; g++) scales[g * W + l] = w.rows.query_scales[l * groups + g];
      for (int64_t plane = 0; plane < 2; plane++)
        for (int64_t d = 0; d < a.dim; d += kInt8Quad)
          std::memcpy(planes + (d / kInt8Group * 2 + plane) * kGroupBytes + d % kInt8Group / kInt8Quad * 64 + l * 4,
                      w.rows.queries + (l * 2 + plane) * a.dim + d, kInt8Quad);
    }
  }
}

void pack_byte_tile_keys(const AttentionArgs& a, const Stored<int8_t>& k, char* out) {
  for (int64_t t = 0; t < kSides; t++)
    for (int64_t pair = 0; pair < group_pairs(a); pair++, out += kTileBytes) {
      V x[W] = {};
      for (int64_t q = 0; q < W; q++)
        if (const int64_t d = pair * kGroupPairBytes + q * kInt8Quad; d < a.dim)
          std::memcpy(&x[q], k.data + d * kKeys + t * 64, 64);
      transpose(x);
      std::memcpy(out, x, sizeof x);
    }
}

void pack_byte_tile_values(const Stored<int8_t>& v, char* out) {
  VI low, high, halves;
  UNROLL for (int i = 0; i < W; i++) {
    low[i] = i % 8 / 4 * W + i % 4 * 4 + i / 8;  // of two vectors, each fourth, from the first on and then the second
    high[i] = low[i] + 2;
    halves[i] = i % 8 + i / 8 * W;
  }
  for (int64_t d = 0; d < v.dim; d += kInt8Quad, out += kInt8Quad * kKeys) {
    VI x[kSides], of[2][2];
    UNROLL for (int64_t i = 0; i < kSides; i++) x[i] = transpose_fours(load_lanes(v.data + d * kKeys + i * 64));
    UNROLL for (int64_t i = 0; i < 2; i++) {
      of[0][i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], low);
      of[1][i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], high);
    }
    UNROLL for (int64_t i = 0; i < 2; i++) {
      const VI even = __builtin_shuffle(of[i][0], of[i][1], halves);
      const VI odd = __builtin_shuffle(of[i][0], of[i][1], halves + 8);
      std::memcpy(out + 2 * i * kKeys, &even, sizeof even);
      std::memcpy(out + (2 * i + 1) * kKeys, &odd, sizeof odd);
    }
  }
}

// All groups' scales of a block; whether all are finite.
bool load_scales(const Stored<int8_t>& x, float* out) {
  VI bad{};
  for (int64_t g = 0; g < byte_groups(x.dim); g++)
    for (int64_t key = 0; key < kKeys; key += W) {
      const V scale = load_byte_scales(x, g, key);
      bad |= not_finite(scale);
      store(out + g * kKeys + key, scale);
    }
  return !bits(bad);
}

VEC V of_planes(const int32_t* whole) {
  return __builtin_convertvector((load_lanes(whole) << 8) + load_lanes(whole + W * W), V);
}

// kLeft times the two planes of a right factor, in registers kSum and on, to whole[plane].
template <int kSum, int kLeft, int kRight, bool kUnsigned>
VEC void multiply_planes(const char* left, const char* planes, int64_t plane_bytes, int32_t* whole) {
  load_tile<kLeft>(left, 64);
  load_tile<kRight>(planes, 64);
  zero_tile<kSum>();
  dot_byte_tiles<kSum, kLeft, kRight, kUnsigned>();
  load_tile<kRight>(planes + plane_bytes, 64);
  zero_tile<kSum + 1>();
  dot_byte_tiles<kSum + 1, kLeft, kRight, kUnsigned>();
  store_tile<kSum>(whole, 64);
  store_tile<kSum + 1>(whole + W * W, 64);
}

// multiply(i) for each of `count`, and use(i) after multiply(i + 1): tiles are slow to give what they have.
template <class Multiply, class Use>
VEC void one_ahead(int64_t count, const Multiply& multiply, const Use& use) {
  multiply(0);
  for (int64_t i = 0; i < count; i++) {
    if (i + 1 < count) multiply(i + 1);
    use(i);
  }
}

// Scores of a side's rows against a block's keys, to s[key][kLanes].
void score_byte_tiles(const AttentionArgs& a, int64_t side, const ByteTileBuffers& w, float* s) {
  const int64_t groups = byte_groups(a.dim), pairs = group_pairs(a);
  const auto whole = [&](int64_t i) { return w.whole + i % 2 * 2 * W * W; };
  one_ahead(
      kSides * groups,
      [&](int64_t i) __attribute__((always_inline)) {
        const int64_t g = i % groups;
        const char* keys = w.keys + (i / groups * pairs + g / 2) * kTileBytes + g % 2 * kInt8Group;
        const char* planes = w.queries + (side * groups + g) * 2 * kGroupBytes;
        if (i % 2)
          multiply_planes<2, 4, 6, false>(keys, planes, kGroupBytes, whole(i));
        else
          multiply_planes<0, 4, 6, false>(keys, planes, kGroupBytes, whole(i));
      },
      [&](int64_t i) __attribute__((always_inline)) {
        const int64_t g = i % groups, key = i / groups * W;
        const V worth = load(w.query_scales + (side * groups + g) * W);
        UNROLL for (int64_t j = 0; j < W; j++) {
          float* at = s + (key + j) * kLanes;
          const V scale = set(w.scales[g * kKeys + key + j]);
          store(at, fma(of_planes(whole(i) + j * W) * worth, scale, g ? load(at) : V{}));
        }
      });
}

// From a side's scores s[key][kLanes] to its weights, times the scales of the values, as right factors; what they are
// worth, by groups of values, and what the rows' sums are to be multiplied by. Where some of the scales are not finite,
// masked keys are left out.
template <bool kFinite>
VEC V weigh_byte_tiles(const AttentionArgs& a, const ByteTileBuffers& w, float* s, float* max_at, float* total_at,
                       V* worth) {
  const int64_t groups = byte_groups(a.value_dim);
  const float* scales = w.scales + byte_groups(a.dim) * kKeys;
  const V old_max = load(max_at);
  V tops[4];
  for (V& top : tops) top = set(-kInfinity);
  for (int64_t j = 0; j < kKeys; j += 4)
    UNROLL for (int64_t i = 0; i < 4; i++) tops[i] = max(load(s + (j + i) * kLanes), tops[i]);
  const V m = max(max(max(tops[0], tops[1]), max(tops[2], tops[3])), old_max), base = finite_or_zero(m);
  const V factor = rescale(old_max, m);
  store(max_at, m);
  V totals[W];
  for (int64_t l = 0; l < W; l++) {
    V total{};
    UNROLL for (int64_t i = 0; i < kSides; i++) {
      float* at = s + (i * W + l) * kLanes;
      const V score = load(at), weight = exp2(score - base);
      const VI masked = score == -kInfinity;
      total = total + (kFinite ? weight : select(masked, V{}, weight));
      store(at, kFinite ? weight : select(masked, set(-1.0f), weight));
    }
    totals[l] = total;
  }
  UNROLL for (int64_t run = W / 2; run > 0; run /= 2) UNROLL for (int64_t l = 0; l < run; l++) totals[l] =
      totals[l] + totals[l + run];
  store(total_at, load(total_at) * factor + totals[0]);
  for (int64_t g = 0; g < groups; g++) {
    const auto scaled = [&](int64_t j) __attribute__((always_inline)) {
      const V weight = load(s + j * kLanes), x = weight * scales[g * kKeys + j];
      return kFinite ? x : select(weight < 0.0f, V{}, x);
    };
    V most[4] = {};
    VI bad{};
    for (int64_t j = 0; j < kKeys; j += 4) UNROLL for (int64_t i = 0; i < 4; i++) {
        const V x = scaled(j + i);
        most[i] = max(x, most[i]);
        if (!kFinite) bad |= not_finite(x);
      }
    const V largest = max(max(most[0], most[1]), max(most[2], most[3]));
    const V up = select(bad | ~(largest > 0x1p-100f), V{}, set(kWeightSteps) / largest);
    worth[g] = select(bad, set(__builtin_nanf("")), largest / set(kWeightSteps));
    char* planes = w.weights + g * 2 * kTileBytes;
    for (int64_t j = 0; j < kKeys; j += 4) {
      VI whole[4];
      UNROLL for (int64_t i = 0; i < 4; i++) {
        const V magic = set(12582912.0f);
        whole[i] = as_int(fma(scaled(j + i), up, magic)) - as_int(magic);
      }
      const VI even = whole[0] | whole[2] << 16, odd = whole[1] | whole[3] << 16, bytes = set_int(0x00ff00ff);
      const VI high = (even >> 8 & bytes) | (odd & ~bytes), low = (even & bytes) | (odd & bytes) << 8;
      std::memcpy(planes + j / 4 * 64, &high, sizeof high);
      std::memcpy(planes + kTileBytes + j / 4 * 64, &low, sizeof low);
    }
  }
  return factor;
}

// sums[d][kLanes] * factor + what a side's weights make of the values.
void add_byte_tiles(const AttentionArgs& a, const ByteTileBuffers& w, const V* worth, V factor, float* sums) {
  const auto whole = [&](int64_t i) { return w.whole + i % 2 * 2 * W * W; };
  const auto group = [](int64_t i) { return i * W / kInt8Group; };
  one_ahead(
      a.value_dim / W,
      [&](int64_t i) __attribute__((always_inline)) {
        const char *values = w.values + i * W * kKeys, *planes = w.weights + group(i) * 2 * kTileBytes;
        if (i % 2)
          multiply_planes<2, 5, 7, true>(values, planes, kTileBytes, whole(i));
        else
          multiply_planes<0, 5, 7, true>(values, planes, kTileBytes, whole(i));
      },
      [&](int64_t i) __attribute__((always_inline)) {
        UNROLL for (int64_t j = 0; j < W; j++) {
          float* at = sums + (i * W + j) * kLanes;
          store(at, fma(of_planes(whole(i) + j * W), worth[group(i)], load(at) * factor));
        }
      });
}

// As walk_panels.
void walk_byte_panels(const AttentionArgs& a, const Rows& rows, const Panel* panels, const ByteTileBuffers& w,
                      Range keys, State s) {
  const TileShapes shapes([](int t) {  // of products 0 to 3, keys, values, queries, weights
    return TileShape{t == 6 ? static_cast<int>(kGroupQuads) : static_cast<int>(kTileSide),
                     t == 4 ? static_cast<int>(kInt8Group) : 64};
  });
  for (int64_t first = keys.lo; first < keys.hi; first += kKeys) {
    Block block;
    set_block(a, rows, first, block);
    bool loaded = false, finite = true;
    for (int64_t i = 0; i * kLanes < rows.count; i++) {
      const Panel& p = panels[i];
      const Range live = live_keys(a, p, block);
      if (live.lo == live.hi) continue;
      if (!loaded) {
        const Stored<int8_t> k = stored_keys<int8_t>(a, rows, first), v = stored_values<int8_t>(a, rows, first);
        pack_byte_tile_keys(a, k, w.keys);
        pack_byte_tile_values(v, w.values);
        load_scales(k, w.scales);
        finite = load_scales(v, w.scales + byte_groups(a.dim) * kKeys);
        loaded = true;
      }
      for (int64_t v = 0; v < p.vectors; v++) score_byte_tiles(a, 2 * i + v, w, w.scores + v * W);
      finish_scores(a, rows, p, block, live, w.scores, kLanes, nullptr);
      std::fill(w.scores, w.scores + live.lo * kLanes, -kInfinity);
      std::fill(w.scores + live.hi * kLanes, w.scores + kKeys * kLanes, -kInfinity);
      for (int64_t v = 0; v < p.vectors; v++) {
        V worth[byte_groups(256)];
        const int64_t lane = i * kLanes + v * W;
        const V factor =
            (finite ? weigh_byte_tiles<true> : weigh_byte_tiles<false>)(a, w, w.scores + v * W, s.max + lane,
                                                                        s.total + lane, worth);
        add_byte_tiles(a, w, worth, factor, s.sums + i * kLanes * a.value_dim + v * W);
      }
    }
  }
}

#else  // there are none

struct ByteTileBuffers {};
bool takes_byte_tiles(const AttentionArgs&) { return false; }
int64_t byte_tile_query_bytes(const AttentionArgs&, int64_t) { return 0; }
int64_t byte_tile_buffer_bytes(const AttentionArgs&) { return 0; }
ByteTileBuffers byte_tile_buffers_at(const AttentionArgs&, char*, int64_t, char*) { return {}; }
template <class F>
void pack_byte_tile_queries(const AttentionArgs&, const Panel&, int64_t, const ByteTileBuffers&, const F&) {}
void walk_byte_panels(const AttentionArgs&, const Rows&, const Panel*, const ByteTileBuffers&, Range, State) {}

#endif

}  // namespace
}  // namespace pyllm::ISA

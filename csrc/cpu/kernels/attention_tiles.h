// Attention, forward, of bf16 on the tile registers (kernels/tiles.h), in an order of its own, the same for many rows and
// few: a score is a chain over 32 elements of dim at a time; weights are rounded to bf16, and 32 keys at a time join the
// sums of a row. Values have one element more, which is 1: its sum is the row's total.
//
// Many rows: as panels, scores [key][lane], the left factors being keys as they lie, and values transposed once for all
// panels. Few rows: scores [row][key], the left factors being keys, read where they lie, and weights; values go to right
// factors by pairs of keys, and the block that is read next is fetched meanwhile.
#pragma once
#include "cpu/amx.h"
#include "cpu/kernels/attention_rows.h"
#include "cpu/kernels/tiles.h"

namespace pyllm::ISA {
namespace {

#if ISA_AVX512

constexpr int64_t kKeyTiles = kHalf / kTileSide;
static_assert(kHalf == kDepth && kKeyTiles == 2 && kHalves == 2 && kLanes == 2 * kTileSide);

bool takes_tiles(const AttentionArgs& a) {
  return a.dtype == DType::bf16 && a.stored == DType::bf16 && a.dim > 0 && cpu::has_amx();
}

int64_t depth_steps(const AttentionArgs& a) { return (a.dim + kDepth - 1) / kDepth; }
int64_t value_tiles(const AttentionArgs& a) { return a.value_dim / kTileSide + 1; }

struct TileBuffers {  // of tiles: queries [panel][step][side], keys [key tile][step], values [tile][half]
  char *queries, *keys, *values;
  float* scores;  // [key][lane]
  bf16* weights;  // [pair of keys][lane][2], or [row][key]
};

int64_t tile_query_bytes(const AttentionArgs& a, int64_t rows) {
  return (rows + kTileSide - 1) / kTileSide * depth_steps(a) * kTileBytes;
}
int64_t tile_buffer_bytes(const AttentionArgs& a) {  // without the queries
  return (kKeys / kTileSide * depth_steps(a) + value_tiles(a) * kHalves) * kTileBytes +
         kKeys * kLanes * static_cast<int64_t>(sizeof(float) + sizeof(bf16));
}
TileBuffers tile_buffers_at(const AttentionArgs& a, char* queries, char* rest) {
  TileBuffers w;
  w.queries = queries;
  w.keys = rest;
  w.values = w.keys + kKeys / kTileSide * depth_steps(a) * kTileBytes;
  w.scores = reinterpret_cast<float*>(w.values + value_tiles(a) * kHalves * kTileBytes);
  w.weights = reinterpret_cast<bf16*>(w.scores + kKeys * kLanes);
  std::memset(w.values, 0, value_tiles(a) * kHalves * kTileBytes);
  return w;
}

// The rows of panel i as right factors, zeros beyond the last; few have one side.
void pack_tile_queries(const AttentionArgs& a, const Rows& rows, const Panel& p, bool few, int64_t i,
                       const TileBuffers& w) {
  const int64_t sides = few ? 1 : 2;
  for (int64_t side = 0; side < sides; side++)
    for (int64_t step = 0; step < depth_steps(a); step++) {
      V x[W] = {};
      for (int64_t l = 0; l < W && side * W + l < p.count; l++)
        x[l] = load_bytes(
            row_at<bf16>(a.q, a.q_step, rows.batch, p.query[side * W + l], p.head[side * W + l]) + step * kDepth,
            std::min(kDepth, a.dim - step * kDepth));
      transpose(x);
      char* out = w.queries + ((i * depth_steps(a) + step) * sides + side) * kTileBytes;
      for (int64_t q = 0; q < W; q++) std::memcpy(out + q * 64, &x[q], 64);
    }
}

bool all_finite(const bf16* p, int64_t step, int64_t count, int64_t dim) {
  VI special{};
  for (int64_t i = 0; i < count; i++)
    for (int64_t d = 0; d < dim; d += 2 * W) {
      const VI x = as_int(load_bytes(p + i * step + d, std::min<int64_t>(2 * W, dim - d)));
      special |= ((x & 0x7f80) == 0x7f80) | ((x & 0x7f800000) == 0x7f800000);
    }
  return bits(special) == 0;
}

// The element after the last of each value is 1.
void pack_ones(const AttentionArgs& a, Range halves, bool right, char* out) {
  const int64_t rest = a.value_dim % kTileSide;
  for (int64_t half = halves.lo; half < halves.hi; half++) {
    char* tile = out + (a.value_dim / kTileSide * kHalves + half) * kTileBytes;
    for (int64_t q = 0; q < kPairs; q++) {
      const uint32_t ones = 0x3f803f80;  // of a pair of keys
      std::memcpy(tile + (right ? q * 64 + rest * 4 : rest * 64 + q * 4), &ones, sizeof ones);
    }
  }
}

// The values of a block as left factors, which is their transpose, or as right ones.
void pack_values(const AttentionArgs& a, const bf16* v, int64_t count, Range halves, bool right, char* out) {
  const Lines lines{v, 1, a.v_step[1], a.value_dim};
  for (int64_t half = halves.lo; half < halves.hi; half++)
    for (int64_t t = 0; t * kTileSide < a.value_dim; t++)
      pack_tile(lines, count, t * kTileSide, half * kHalf, right, out + (t * kHalves + half) * kTileBytes, 64);
  pack_ones(a, halves, right, out);
}

// The sums of `rows` rows with values that are not all finite: those of a key that a negative weight marks stay out.
template <class Weight, class Sum>
void add_marked_tiles(int64_t rows, const bf16* v, int64_t v_step, Range halves, int64_t count, int64_t dim,
                      const Weight& weight, const Sum& sum) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t d = 0; d <= dim; d++)
      for (int64_t half = halves.lo; half < halves.hi; half++) {
        float chain[2] = {0, 0};
        for (int64_t j = half * kHalf; j < std::min(count, (half + 1) * kHalf); j++) {
          const float w = to_float(weight(r, j));
          if (!(w < 0))
            chain[j % 2] = __builtin_fmaf(w, d < dim ? factor_of_tile(v[j * v_step + d]) : 1.0f, chain[j % 2]);
        }
        *sum(r, d) += chain[0] + chain[1];
      }
}

// Whole halves take in keys of the block that no row sees: their weights are 0, but their values may not be finite.
bool takes_unseen(Range live, const Block& b) {
  return live.lo % kHalf != 0 || (live.hi % kHalf != 0 && live.hi < b.count);
}

// ---- Many rows.

template <int kSides>
void score_half(const char* keys, const char* queries, int64_t steps, float* s) {
  constexpr int64_t s_bytes = kLanes * sizeof(float);
  zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  for (int64_t i = 0; i < steps; i++, queries += 2 * kTileBytes) {
    load_tile<4>(keys + i * kTileBytes, 64);
    load_tile<5>(keys + (steps + i) * kTileBytes, 64);
    load_tile<6>(queries, 64);
    dot_bf16_tiles<0, 4, 6>();
    dot_bf16_tiles<2, 5, 6>();
    if constexpr (kSides == 2) {
      load_tile<7>(queries + kTileBytes, 64);
      dot_bf16_tiles<1, 4, 7>();
      dot_bf16_tiles<3, 5, 7>();
    }
  }
  store_tile<0>(s, s_bytes), store_tile<2>(s + kTileSide * kLanes, s_bytes);
  if constexpr (kSides == 2) store_tile<1>(s + W, s_bytes), store_tile<3>(s + kTileSide * kLanes + W, s_bytes);
}

// Sums of kDown tiles of values.
template <int kSides, int kDown>
void add_value_tiles(const char* values, Range halves, const bf16* weights, float* sums) {
  constexpr int64_t bytes = kLanes * sizeof(float);
  float* below = sums + kTileSide * kLanes;
  load_tile<0>(sums, bytes);
  if constexpr (kSides == 2) load_tile<1>(sums + W, bytes);
  if constexpr (kDown == 2) load_tile<2>(below, bytes);
  if constexpr (kDown == 2 && kSides == 2) load_tile<3>(below + W, bytes);
  for (int64_t half = halves.lo; half < halves.hi; half++) {
    const bf16* w = weights + half * kHalf * kLanes;
    load_tile<4>(values + half * kTileBytes, 64);
    load_tile<6>(w, bytes);
    dot_bf16_tiles<0, 4, 6>();
    if constexpr (kDown == 2) {
      load_tile<5>(values + (kHalves + half) * kTileBytes, 64);
      dot_bf16_tiles<2, 5, 6>();
    }
    if constexpr (kSides == 2) {
      load_tile<7>(w + 2 * W, bytes);
      dot_bf16_tiles<1, 4, 7>();
      if constexpr (kDown == 2) dot_bf16_tiles<3, 5, 7>();
    }
  }
  store_tile<0>(sums, bytes);
  if constexpr (kSides == 2) store_tile<1>(sums + W, bytes);
  if constexpr (kDown == 2) store_tile<2>(below, bytes);
  if constexpr (kDown == 2 && kSides == 2) store_tile<3>(below + W, bytes);
}

template <int kSides>
void add_values(const char* values, int64_t tiles, Range halves, const bf16* weights, float* sums) {
  int64_t t = 0;
  for (; t + 2 <= tiles; t += 2)
    add_value_tiles<kSides, 2>(values + t * kHalves * kTileBytes, halves, weights, sums + t * kTileSide * kLanes);
  if (t < tiles)
    add_value_tiles<kSides, 1>(values + t * kHalves * kTileBytes, halves, weights, sums + t * kTileSide * kLanes);
}

// Weights of a panel from its scores of whole halves; what its sums are to be multiplied by. kMark: -1 where masked.
template <bool kMark>
VEC void weigh(const Panel& p, Range halves, V scale, const float* s, float* max, bf16* weights, V* factor) {
  for (int64_t v = 0; v < p.vectors; v++) {
    const V old_max = load(max + v * W);
    const float* column = s + v * W;
    V tops[4];
    for (V& top : tops) top = set(-kInfinity);
    for (int64_t j = halves.lo * kHalf; j < halves.hi * kHalf; j += 4)
      UNROLL for (int64_t i = 0; i < 4; i++) tops[i] = pyllm::ISA::max(load(column + (j + i) * kLanes), tops[i]);
    const V top = pyllm::ISA::max(pyllm::ISA::max(tops[0], tops[1]), pyllm::ISA::max(tops[2], tops[3]));
    const V m = pyllm::ISA::max(top * scale, old_max), base = finite_or_zero(m);
    factor[v] = rescale(old_max, m);
    store(max + v * W, m);
    const auto weight = [&](int64_t j) __attribute__((always_inline)) {
      const V x = load(column + j * kLanes), e = exp2_short(fma(x, scale, -base));
      return kMark ? select(x == -kInfinity, set(-1.0f), e) : e;
    };
    for (int64_t j = halves.lo * kHalf; j < halves.hi * kHalf; j += 2)
      store_bf16_pairs(weights + j * kLanes + v * 2 * W, weight(j), weight(j + 1));
  }
}

// As walk_panels; a panel's sums are `sums_step` by kLanes.
void walk_tile_panels(const AttentionArgs& a, const Rows& rows, const Panel* panels, const TileBuffers& w, Range keys,
                      int64_t sums_step, State s) {
  const TileShapes shapes(static_cast<int>(kTileSide), static_cast<int>(kPairs));
  const Scale scale = scale_of(a);
  const int64_t steps = depth_steps(a);
  for (int64_t first = keys.lo; first < keys.hi; first += kKeys) {
    Block block;
    set_block(a, rows, first, block);
    const bf16 *k = stored_keys<bf16>(a, rows, first).data, *v = stored_values<bf16>(a, rows, first).data;
    bool loaded = false, checked = false, finite = true;
    for (int64_t i = 0; i * kLanes < rows.count; i++) {
      const Panel& p = panels[i];
      const Range live = live_keys(a, p, block);
      if (live.lo == live.hi) continue;
      if (!loaded) {
        const Lines lines{k, a.k_step[1], 1, block.count};
        for (int64_t t = 0; t < round_up(block.count, kHalf) / kTileSide; t++)
          for (int64_t step = 0; step < steps; step++)
            pack_tile(lines, a.dim, t * kTileSide, step * kDepth, false, w.keys + (t * steps + step) * kTileBytes, 64);
        pack_values(a, v, block.count, {0, round_up(block.count, kHalf) / kHalf}, false, w.values);
        loaded = true;
      }
      const Range halves = halves_of(live);
      for (int64_t half = halves.lo; half < halves.hi; half++)
        (p.vectors == 1 ? score_half<1> : score_half<2>)(w.keys + half * kKeyTiles * steps * kTileBytes,
                                                         w.queries + i * 2 * steps * kTileBytes, steps,
                                                         w.scores + half * kHalf * kLanes);
      if (scale.before != 1)
        for (float* at = w.scores + live.lo * kLanes; at < w.scores + live.hi * kLanes; at += W)
          store(at, load(at) * scale.before);
      const bool masked =
          finish_scores(a, rows, p, block, live, w.scores, kLanes, nullptr) || takes_unseen(live, block);
      std::fill(w.scores + halves.lo * kHalf * kLanes, w.scores + live.lo * kLanes, -kInfinity);
      std::fill(w.scores + live.hi * kLanes, w.scores + halves.hi * kHalf * kLanes, -kInfinity);
      if (masked && !checked) {
        finite = all_finite(v, a.v_step[1], block.count, a.value_dim);
        checked = true;
      }
      const bool mark = masked && !finite;
      V factor[2] = {set(1.0f), set(1.0f)};
      (mark ? weigh<true> : weigh<false>)(p, halves, set(scale.after), w.scores, s.max + i * kLanes, w.weights, factor);
      float* sums = s.sums + i * sums_step * kLanes;
      if (bits((factor[0] != 1.0f) | (factor[1] != 1.0f)))
        for (int64_t d = 0; d <= a.value_dim; d++)
          for (int64_t side = 0; side < p.vectors; side++)
            store(sums + d * kLanes + side * W, load(sums + d * kLanes + side * W) * factor[side]);
      if (mark)
        add_marked_tiles(
            p.vectors * W, v, a.v_step[1], halves, live.hi, a.value_dim,
            [&](int64_t lane, int64_t j) { return w.weights[j / 2 * 2 * kLanes + lane * 2 + j % 2]; },
            [&](int64_t lane, int64_t d) { return sums + d * kLanes + lane; });
      else
        (p.vectors == 1 ? add_values<1> : add_values<2>)(w.values, value_tiles(a), halves, w.weights, sums);
    }
  }
  for (int64_t i = 0; i * kLanes < rows.count; i++)
    std::memcpy(s.total + i * kLanes, s.sums + (i * sums_step + a.value_dim) * kLanes, kLanes * sizeof(float));
}

// ---- Few rows.

// x, of N vectors, holds W rows of N floats: transposed to N rows of W.
template <int N>
VEC void columns(const float* x, V* out) {
  if constexpr (N == 1) {
    out[0] = load(x);
  } else {
    VI even, odd;
    UNROLL for (int l = 0; l < W; l++) even[l] = 2 * l, odd[l] = 2 * l + 1;
    V v[N];
    UNROLL for (int i = 0; i < N; i++) v[i] = load(x + i * W);
    // Each round parts what is at even places from what is at odd ones, within runs of `run` vectors.
    UNROLL for (int run = N; run > 1; run /= 2) {
      V next[N];
      UNROLL for (int i = 0; i < N; i += run) UNROLL for (int h = 0; h < run / 2; h++) {
        next[i + h] = __builtin_shuffle(v[i + 2 * h], v[i + 2 * h + 1], even);
        next[i + run / 2 + h] = __builtin_shuffle(v[i + 2 * h], v[i + 2 * h + 1], odd);
      }
      UNROLL for (int i = 0; i < N; i++) v[i] = next[i];
    }
    UNROLL for (int i = 0; i < N; i++) {  // row i ended at the place whose bits are i's in reverse
      int place = 0;
      for (int bit = 1; bit < N; bit *= 2) place = place * 2 + (i & bit ? 1 : 0);
      out[i] = v[place];
    }
  }
}

// Products of a half's keys with N columns of queries, a row each, to x[row][2 * kKeys].
template <int N>
void score_rows_half(const AttentionArgs& a, int64_t rows, const bf16* k, int64_t count, int64_t half,
                     const TileBuffers& w, float* x) {
  const int64_t steps = depth_steps(a), first = half * kHalf;
  const bool in_place = first + kHalf <= count && a.dim % kDepth == 0;
  const int64_t row_bytes = in_place ? 2 * a.k_step[1] : 64, step_bytes = in_place ? 64 : kTileBytes;
  const char* left = in_place ? reinterpret_cast<const char*>(k + first * a.k_step[1]) : w.keys;
  const char* right = in_place ? left + kTileSide * row_bytes : w.keys + steps * kTileBytes;
  if (!in_place)
    for (int64_t t = 0; t < kKeyTiles; t++)
      for (int64_t step = 0; step < steps; step++)
        pack_tile({k, a.k_step[1], 1, count}, a.dim, first + t * kTileSide, step * kDepth, false,
                  w.keys + (t * steps + step) * kTileBytes, 64);
  zero_tile<0>(), zero_tile<1>();
  for (int64_t step = 0; step < steps; step++, left += step_bytes, right += step_bytes) {
    load_tile<6>(w.queries + step * kTileBytes, 64);
    load_tile<4>(left, row_bytes);
    dot_bf16_tiles<0, 4, 6>();
    load_tile<4>(right, row_bytes);
    dot_bf16_tiles<1, 4, 6>();
  }
  float* s = w.scores;
  store_tile<0>(s, N * sizeof(float)), store_tile<1>(s + N * W, N * sizeof(float));
  for (int64_t t = 0; t < kKeyTiles; t++) {
    V lines[N];
    columns<N>(s + t * N * W, lines);
    for (int64_t r = 0; r < rows; r++) store(x + r * 2 * kKeys + first + t * kTileSide, lines[r]);
  }
}

// From a row's products to its weights of whole halves, -1 where masked and `mark`; what its sums are multiplied by.
float weigh_row(const AttentionArgs& a, const Rows& rows, const Panel& p, int64_t row, const Block& block, Range live,
                bool masks, bool mark, float* x, float& max, bf16* weights) {
  const Scale scale = scale_of(a);
  const Range halves = halves_of(live);
  const int64_t lo = halves.lo * kHalf, hi = halves.hi * kHalf;
  V top = set(-kInfinity);
  if (masks || scale.before != 1) {
    for (int64_t j = lo; j < hi; j += W) store(x + j, load(x + j) * scale.before);
    top = finish_row(a, rows, p, row, block, live, x);
  }
  std::fill(x + lo, x + live.lo, -kInfinity);
  std::fill(x + live.hi, x + hi, -kInfinity);
  for (int64_t j = lo; j < hi; j += W) top = pyllm::ISA::max(load(x + j), top);
  const float old_max = max;
  max = pyllm::ISA::max(set(pyllm::ISA::max(top)) * scale.after, set(old_max))[0];
  const V base = finite_or_zero(set(max));
  const auto weight = [&](int64_t j) __attribute__((always_inline)) {
    const V score = load(x + j), e = exp2_short(fma(score, set(scale.after), -base));
    return mark ? select(score == -kInfinity, set(-1.0f), e) : e;
  };
  for (int64_t j = lo; j < hi; j += 2 * W) store_bf16(weights + j, weight(j), weight(j + W));
  return max == old_max ? 1 : rescale(set(old_max), set(max))[0];
}

// Whole groups of 32 value elements go to their two tiles as instructions interleave them: four of the one, four of the
// other.
bool by_fours(const AttentionArgs& a) { return a.value_dim % (2 * W) == 0; }
int64_t place_by_fours(int64_t d) { return d / 32 * 32 + d % 8 / 4 * 16 + d % 32 / 8 * 4 + d % 4; }

void pack_values_by_fours(const AttentionArgs& a, const bf16* v, int64_t count, int64_t half, char* out) {
  using Words = uint16_t __attribute__((vector_size(4 * W)));
  Words low, high;
  UNROLL for (int i = 0; i < 2 * W; i++) {
    low[i] = static_cast<uint16_t>(i / 8 * 8 + i % 8 / 2 + i % 2 * 2 * W);
    high[i] = static_cast<uint16_t>(low[i] + 4);
  }
  for (int64_t q = 0; q < kPairs; q++) {
    const int64_t key = half * kHalf + 2 * q;
    const bf16* row = v + key * a.v_step[1];
    char* to = out + half * kTileBytes + q * 64;
    for (int64_t d = 0; d < a.value_dim; d += 2 * W, to += 2 * kHalves * kTileBytes) {
      Words even{}, odd{};
      if (key < count) std::memcpy(&even, row + d, sizeof even);
      if (key + 1 < count) std::memcpy(&odd, row + a.v_step[1] + d, sizeof odd);
      const Words first = __builtin_shuffle(even, odd, low), second = __builtin_shuffle(even, odd, high);
      std::memcpy(to, &first, sizeof first);
      std::memcpy(to + kHalves * kTileBytes, &second, sizeof second);
    }
  }
  pack_ones(a, {half, half + 1}, true, out);
}

void order_sums(const AttentionArgs& a, float* sums) {  // places by fours as they are in the values
  for (int64_t d = 0; d < a.value_dim; d += 2 * W) {
    float block[2 * W];
    for (int64_t i = 0; i < 2 * W; i++) block[i] = sums[d + place_by_fours(i)];
    std::memcpy(sums + d, block, sizeof block);
  }
}

// As walk_rows for the block of keys from `first` on, for all of up to W - 1 rows at once, in N columns; a row's sums are
// `sums_step` long. The block that is read next is fetched meanwhile.
template <int N>
void walk_tile_rows(const AttentionArgs& a, const Rows& rows, const Panel& p, const TileBuffers& w, int64_t first,
                    Ahead ahead, int64_t sums_step, State s) {
  Block block;
  set_block(a, rows, first, block);
  const Range live = live_keys(a, p, block), halves = halves_of(live);
  if (live.lo == live.hi) return;
  const int few = static_cast<int>(rows.count), side = static_cast<int>(kTileSide);
  const TileShapes shapes([&](int t) {  // of products 0, 1, of sums 2, 3, of keys, weights, queries, values
    return TileShape{t == 2 || t == 3 || t == 5 ? few : side, t == 0 || t == 1 || t == 6 ? 4 * N : 64};
  });
  const bf16 *k = stored_keys<bf16>(a, rows, first).data, *v = stored_values<bf16>(a, rows, first).data;
  alignas(64) float x[W][2 * kKeys];
  for (int64_t half = halves.lo; half < halves.hi; half++) {
    ahead.ask(ahead.left() / (2 * kHalves - half));
    score_rows_half<N>(a, rows.count, k, block.count, half, w, &x[0][0]);
  }
  const bool masks = may_mask(a, p, block, live);
  const bool mark = (masks || takes_unseen(live, block)) && !all_finite(v, a.v_step[1], block.count, a.value_dim);
  for (int64_t r = 0; r < rows.count; r++) {
    const float factor = weigh_row(a, rows, p, r, block, live, masks, mark, x[r], s.max[r], w.weights + r * kKeys);
    float* sums = s.sums + r * sums_step;
    if (factor != 1)
      for (int64_t d = 0; d < sums_step; d += W) store(sums + d, load(sums + d) * factor);
  }
  if (mark)
    return add_marked_tiles(
        rows.count, v, a.v_step[1], halves, live.hi, a.value_dim,
        [&](int64_t r, int64_t j) { return w.weights[r * kKeys + j]; },
        [&](int64_t r, int64_t d) {
          return s.sums + r * sums_step + (by_fours(a) && d < a.value_dim ? place_by_fours(d) : d);
        });
  for (int64_t half = halves.lo; half < halves.hi; half++) {
    ahead.ask(ahead.left() / (kHalves - half));
    if (by_fours(a))
      pack_values_by_fours(a, v, block.count, half, w.values);
    else
      pack_values(a, v, block.count, {half, half + 1}, true, w.values);
  }
  for (int64_t t = 0; t < value_tiles(a); t++) {
    float* sums = s.sums + t * kTileSide;
    load_tile<2>(sums, sums_step * sizeof(float));
    for (int64_t half = halves.lo; half < halves.hi; half++) {
      load_tile<5>(w.weights + half * kHalf, kKeys * sizeof(bf16));
      load_tile<7>(w.values + (t * kHalves + half) * kTileBytes, 64);
      dot_bf16_tiles<2, 5, 7>();
    }
    store_tile<2>(sums, sums_step * sizeof(float));
  }
}

void walk_tile_rows(const AttentionArgs& a, const Rows& rows, const Panel& p, const TileBuffers& w, int64_t first,
                    Ahead ahead, int64_t sums_step, State s) {
  const auto walk = rows.count == 1   ? walk_tile_rows<1>
                    : rows.count == 2 ? walk_tile_rows<2>
                    : rows.count <= 4 ? walk_tile_rows<4>
                    : rows.count <= 8 ? walk_tile_rows<8>
                                      : walk_tile_rows<16>;
  walk(a, rows, p, w, first, ahead, sums_step, s);
}

// After the last block: sums in the order of the values, and the totals out of them.
void end_tile_rows(const AttentionArgs& a, int64_t rows, int64_t sums_step, State s) {
  for (int64_t r = 0; r < rows; r++) {
    float* sums = s.sums + r * sums_step;
    if (by_fours(a)) order_sums(a, sums);
    s.total[r] = sums[a.value_dim];
  }
}

#else  // there are none

struct TileBuffers {};
bool takes_tiles(const AttentionArgs&) { return false; }
int64_t tile_query_bytes(const AttentionArgs&, int64_t) { return 0; }
int64_t tile_buffer_bytes(const AttentionArgs&) { return 0; }
TileBuffers tile_buffers_at(const AttentionArgs&, char*, char*) { return {}; }
void pack_tile_queries(const AttentionArgs&, const Rows&, const Panel&, bool, int64_t, const TileBuffers&) {}
void walk_tile_panels(const AttentionArgs&, const Rows&, const Panel*, const TileBuffers&, Range, int64_t, State) {}
void walk_tile_rows(const AttentionArgs&, const Rows&, const Panel&, const TileBuffers&, int64_t, Ahead, int64_t,
                    State) {}
void end_tile_rows(const AttentionArgs&, int64_t, int64_t, State) {}

#endif

}  // namespace
}  // namespace pyllm::ISA

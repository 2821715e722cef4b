// Attention, backward, on the tile registers: a tile of rows against a block of keys. bf16 has P and dS rounded to bf16
// before they are multiplied, as torch has; fp32 has every factor cut in three (kernels/parts.h).
//
// S' = K Q' and dP' = V dO' have queries across the lanes, a panel at a time. P and dS leave that pass as left factors of
// dV = P' dO and dK = dS' Q, for all of the tile's panels, so that the sums of keys are read and written once a tile, and
// dS also as the right factor of dQ' = K' dS', which follows at once. Each sum is a chain over 32 keys or rows at a time,
// in order; what is masked adds zeros, so that its bits are those of any other number of rows in a tile.
#pragma once
#include "cpu/amx.h"
#include "cpu/kernels/attention_backward.h"
#include "cpu/kernels/parts.h"

namespace pyllm::ISA {
namespace {

#if ISA_AVX512

// 16 lines by 32 of k of a factor whose lines and k are whole.
[[maybe_unused]] void pack_factor(const bf16* data, int64_t step, int64_t k_step, int64_t lines, int64_t k,
                                  int64_t line, int64_t k0, bool right, char* out) {
  pack_tile({data, step, k_step, lines}, k, line, k0, right, out, 64);
}
[[maybe_unused]] void pack_factor(const float* data, int64_t step, int64_t k_step, int64_t lines, int64_t k,
                                  int64_t line, int64_t k0, bool right, char* out) {
  cut_lines({data, step, k_step, lines}, k, line, k0, right, out);
}

template <class T>
class TileWork {
 public:
  static constexpr int kOf = std::is_same_v<T, bf16> ? 1 : kParts;
  float* dq;  // [panel][dim_step][kLanes]

  static bool takes(const AttentionArgs& a) {
    return (a.dtype == DType::bf16 || a.dtype == DType::f32) && cpu::has_amx();
  }

  // Rows of a tile: as many as leave its factors in the second-level cache, as keys are packed anew for each tile. How
  // many enter no sum's order.
  static int64_t most_rows(const AttentionArgs& a) {
    const int64_t bytes = 2 * kOf * (2 * (a.dim + a.value_dim) + 2 * kKeys) + 4 * a.dim;  // of a row
    return std::clamp<int64_t>(kHeldBytes / bytes / kLanes * kLanes, kLanes, kMostTileRows);
  }

  TileWork(const Gradients<T>& gradients, int64_t most)
      : g(gradients),
        a(g.a),
        most_panels(most / kLanes),
        shapes(static_cast<int>(kTileSide), static_cast<int>(kPairs)) {
    dim_steps = (a.dim + kDepth - 1) / kDepth;
    value_steps = (a.value_dim + kDepth - 1) / kDepth;
    dim_tiles = g.dim_step / kTileSide;
    value_tiles = g.value_step / kTileSide;
    width = std::max(dim_steps, value_steps) * kDepth;
    char** const factors[] = {&queries, &dout,      &query_rows, &dout_rows, &keys,
                              &values,  &keys_down, &weights,    &dscores,   &dscores_right};
    const int64_t tiles[] = {2 * most_panels * dim_steps, 2 * most_panels * value_steps,
                             dim_tiles * most_panels,     value_tiles * most_panels,
                             kKeySides * dim_steps,       kKeySides * value_steps,
                             dim_tiles * kHalves,         kKeySides * most_panels,
                             kKeySides * most_panels,     2 * kHalves};
    float** const floats[] = {&dq, &scores, &products, &capped, &lse, &level};
    const int64_t counts[] = {most * g.dim_step, kKeys * kLanes, kKeys * kLanes, kKeys * kLanes, most, most};
    int64_t bytes = kKeys * width * sizeof(T);
    for (int64_t n : tiles) bytes += n * kFactor;
    for (int64_t n : counts) bytes += n * sizeof(float);
    auto* p = static_cast<char*>(cpu::scratch(bytes, 1));
    for (int i = 0; i < 10; p += tiles[i++] * kFactor) *factors[i] = p;
    for (int i = 0; i < 6; p += counts[i++] * sizeof(float)) *floats[i] = reinterpret_cast<float*>(p);
    rows = reinterpret_cast<T*>(p);
  }

  float key_factor() const { return g.factor(); }

  void load_rows(RowTile& t, bool by_rows) {
    for (int64_t i = 0; i * kLanes < t.rows.count; i++) {
      Panel& p = t.panels[i];
      p.vectors = 2;  // lanes beyond the last row are zeros
      const auto load = [&](int64_t dim, int64_t steps, int64_t tiles, char* across, char* down, const auto& row_of) {
        for (int64_t l = 0; l < kLanes; l++) copy_row(l < p.count ? row_of(l) : nullptr, dim, rows + l * width);
        pack(kLanes, steps, true, across + i * 2 * steps * kFactor, steps);
        if (by_rows) pack_down(kLanes, tiles, true, down + i * kFactor, most_panels);
      };
      load(a.dim, dim_steps, dim_tiles, queries, query_rows, [&](int64_t l) { return g.query(t.rows, p, l); });
      load(a.value_dim, value_steps, value_tiles, dout, dout_rows, [&](int64_t l) { return g.dout(t.rows, p, l); });
      g.load_statistics(t.rows, p, lse + i * kLanes, level + i * kLanes);
    }
  }

  // Keys from `first` on; those beyond `seen` are not read, as they may be anything.
  void load_block(const Rows& of, int64_t first, Range seen) {
    set_block(a, of, first, block);
    const Range live{std::max<int64_t>(0, seen.lo - first), std::min(block.count, seen.hi - first)};
    const auto load = [&](const Stored<T>& x) {
      for (int64_t j = 0; j < kKeys; j++)
        copy_row(j >= live.lo && j < live.hi ? x.data + j * x.step : nullptr, x.dim, rows + j * width);
    };
    load(stored_values<T>(a, of, first));
    pack(kKeys, value_steps, false, values, value_steps);
    load(stored_keys<T>(a, of, first));
    pack(kKeys, dim_steps, false, keys, dim_steps);
    pack_down(kKeys, dim_tiles, false, keys_down, kHalves);
  }

  // The tile against the block: dq, the block's dk and dv, each where it is wanted.
  void step(const RowTile& t, bool want_dq, float* dk, float* dv) {
    Range halves[kMostTileRows / kLanes], panels[kHalves];
    for (Range& r : panels) r = {most_panels, 0};
    const int64_t count = (t.rows.count + kLanes - 1) / kLanes;
    for (int64_t i = 0; i < count; i++) {
      const Range live = live_keys(a, t.panels[i], block);
      halves[i] = halves_of(live);
      if (live.lo == live.hi) continue;
      for (int64_t h = halves[i].lo; h < halves[i].hi; h++) panels[h] = {std::min(panels[h].lo, i), i + 1};
      panel_gradients(t, i, live, want_dq, dk != nullptr);
      if (want_dq)
        add_product(keys_down + halves[i].lo * kFactor, kHalves, dim_tiles, dscores_right + halves[i].lo * kFactor,
                    kHalves, 2, halves[i].hi - halves[i].lo, dq + i * g.dim_step * kLanes, kLanes, true);
    }
    for (int64_t h = 0; dk && h < kHalves; h++) {
      for (int64_t i = panels[h].lo; i < panels[h].hi; i++)
        if (h < halves[i].lo || h >= halves[i].hi)
          for (char* x : {weights, dscores})
            for (int64_t side = 0; side < 2; side++) std::memset(x + left_at(2 * h + side, i), 0, kFactor);
      const int64_t at = panels[h].lo * kFactor, steps = panels[h].hi - panels[h].lo;
      if (steps <= 0) continue;
      add_product(weights + left_at(2 * h, panels[h].lo), most_panels, 2, dout_rows + at, most_panels, value_tiles,
                  steps, dv + h * kHalf * g.value_step, g.value_step, true);
      add_product(dscores + left_at(2 * h, panels[h].lo), most_panels, 2, query_rows + at, most_panels, dim_tiles,
                  steps, dk + h * kHalf * g.dim_step, g.dim_step, true);
    }
  }

 private:
  static constexpr int64_t kFactor = kOf * kTileBytes;  // of a tile
  static constexpr int64_t kKeySides = kKeys / kTileSide;
  static constexpr int64_t kHeldBytes = 5 << 18;

  const Gradients<T>& g;
  const AttentionArgs& a;
  const int64_t most_panels;  // of a tile
  const TileShapes shapes;
  int64_t dim_steps, value_steps, dim_tiles, value_tiles, width;
  char *queries, *dout;               // right factors [panel][side][step]
  char *query_rows, *dout_rows;       // right factors [tile of dim][panel]
  char *keys, *values, *keys_down;    // left factors [side][step], and [tile of dim][half]
  char *weights, *dscores;            // left factors [side of keys][panel]
  char* dscores_right;                // of a panel: [side][half]
  float *scores, *products, *capped;  // of a panel: [key][kLanes]
  float *lse, *level;
  T* rows;  // as they are packed from, `width` apart
  Block block;

  int64_t left_at(int64_t side, int64_t panel) const { return (side * most_panels + panel) * kFactor; }

  void copy_row(const T* from, int64_t dim, T* to) const {
    const int64_t count = from ? dim : 0;
    if (count) std::memcpy(static_cast<void*>(to), from, count * sizeof(T));
    std::memset(static_cast<void*>(to + count), 0, (round_up(dim, kDepth) - count) * sizeof(T));
  }
  // The copied rows as lines of a factor, k along them: [line tile][steps]; or k down them: [tile][step of `line_step`].
  void pack(int64_t count, int64_t steps, bool right, char* out, int64_t line_step) const {
    for (int64_t line = 0; line < count; line += kTileSide)
      for (int64_t s = 0; s < steps; s++)
        pack_factor(rows, width, 1, count, steps * kDepth, line, s * kDepth, right,
                    out + (line / kTileSide * line_step + s) * kFactor);
  }
  void pack_down(int64_t count, int64_t tiles, bool right, char* out, int64_t line_step) const {
    for (int64_t tile = 0; tile < tiles; tile++)
      for (int64_t k = 0; k < count; k += kDepth)
        pack_factor(rows, 1, width, tiles * kTileSide, count, tile * kTileSide, k, right,
                    out + (tile * line_step + k / kDepth) * kFactor);
  }

  template <int kDown, int kAcross>
  static void add_square(const char* left, int64_t left_line, const char* right, int64_t right_line, int64_t steps,
                         float* c, int64_t c_step, bool accumulate) {
    const int64_t bytes = c_step * sizeof(float);
    float* below = c + kTileSide * c_step;
    if (accumulate) {
      load_tile<0>(c, bytes);
      if constexpr (kAcross == 2) load_tile<1>(c + W, bytes);
      if constexpr (kDown == 2) load_tile<2>(below, bytes);
      if constexpr (kDown == 2 && kAcross == 2) load_tile<3>(below + W, bytes);
    } else {
      zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    }
    for (int64_t s = 0; s < steps; s++)
      dot_step<kOf, kDown, kAcross>(left + s * kFactor, left_line, right + s * kFactor, right_line);
    store_tile<0>(c, bytes);
    if constexpr (kAcross == 2) store_tile<1>(c + W, bytes);
    if constexpr (kDown == 2) store_tile<2>(below, bytes);
    if constexpr (kDown == 2 && kAcross == 2) store_tile<3>(below + W, bytes);
  }

  // C of 16 `down` by 16 `across`, from zero or what it was; `*_line`: tiles from 16 lines to the next.
  static void add_product(const char* left, int64_t left_line, int64_t down, const char* right, int64_t right_line,
                          int64_t across, int64_t steps, float* c, int64_t c_step, bool accumulate) {
    left_line *= kFactor, right_line *= kFactor;
    for (int64_t i = 0; i < down; i += 2)
      for (int64_t j = 0; j < across; j += 2) {
        const auto square = i + 1 < down ? (j + 1 < across ? add_square<2, 2> : add_square<2, 1>)
                                         : (j + 1 < across ? add_square<1, 2> : add_square<1, 1>);
        square(left + i * left_line, left_line, right + j * right_line, right_line, steps,
               c + i * kTileSide * c_step + j * kTileSide, c_step, accumulate);
      }
  }

  static V exponential(V x) {
    if constexpr (kOf == 1) return exp2_short(x);
    return exp2(x);
  }
  // Rows `first` and `second` of a left factor, of 2 W floats each, and of a right one for both sides.
  static constexpr int64_t kPairStep = kOf == 1 ? 1 : kTileSide;  // keys that are multiplied together
  VEC static void put_left(char* out, V low, V high) {
    if constexpr (kOf == 1)
      store_bf16(reinterpret_cast<bf16*>(out), low, high);
    else
      cut(low, high, out);
  }
  VEC static void put_right(char* out, V first, V second) {
    if constexpr (kOf == 1)
      store_bf16_pairs(reinterpret_cast<bf16*>(out), first, second);
    else
      cut(first, second, out);
  }

  // P and dS of a panel against the block's live keys, as factors.
  void panel_gradients(const RowTile& t, int64_t i, Range live, bool want_dq, bool want_keys) {
    const Panel& p = t.panels[i];
    const Range halves = halves_of(live);
    const Scale scale = scale_of(a);
    const int64_t lo = halves.lo * kHalf, hi = halves.hi * kHalf, sides = 2 * (halves.hi - halves.lo);
    add_product(keys + 2 * halves.lo * dim_steps * kFactor, dim_steps, sides, queries + i * 2 * dim_steps * kFactor,
                dim_steps, 2, dim_steps, scores + lo * kLanes, kLanes, false);
    add_product(values + 2 * halves.lo * value_steps * kFactor, value_steps, sides,
                dout + i * 2 * value_steps * kFactor, value_steps, 2, value_steps, products + lo * kLanes, kLanes,
                false);
    if (scale.before != 1)
      for (float* at = scores + live.lo * kLanes; at < scores + live.hi * kLanes; at += W)
        store(at, load(at) * scale.before);
    finish_scores(a, t.rows, p, block, live, scores, kLanes, capped);
    std::fill(scores + lo * kLanes, scores + live.lo * kLanes, -kInfinity);
    std::fill(scores + live.hi * kLanes, scores + hi * kLanes, -kInfinity);
    g.add_dweights(t.rows, p, block, live, products, kLanes);
    const V total[] = {load(lse + i * kLanes), load(lse + i * kLanes + W)};
    const V mean[] = {load(level + i * kLanes), load(level + i * kLanes + W)};
    const V after = set(scale.after);
    for (int64_t half = halves.lo; half < halves.hi; half++)
      for (int64_t q = 0; q < kTileSide; q++) {
        const int64_t first = kOf == 1 ? 2 * q : q;
        V w[2][2], d[2][2];  // [key][side]
        UNROLL for (int64_t k = 0; k < 2; k++) UNROLL for (int64_t side = 0; side < 2; side++) {
          const int64_t at = (half * kHalf + first + k * kPairStep) * kLanes + side * W;
          const V score = load(scores + at);
          w[k][side] = exponential(fma(score, after, -total[side]));
          d[k][side] = w[k][side] * (load(products + at) - mean[side]);
          if (a.softcap > 0) {
            const V c = load(capped + at);
            d[k][side] = d[k][side] * ((1.0f - c * c) * a.softcap);
          }
          d[k][side] = select(score == -kInfinity, V{}, d[k][side]);
        }
        if (want_keys) UNROLL for (int64_t k = 0; k < 2; k++) {
            const int64_t key = first + k * kPairStep;
            const int64_t at = left_at(2 * half + key / kTileSide, i) + key % kTileSide * 64;
            put_left(weights + at, w[k][0], w[k][1]);
            put_left(dscores + at, d[k][0], d[k][1]);
          }
        if (want_dq)
          UNROLL for (int64_t side = 0; side < 2; side++)
              put_right(dscores_right + (side * kHalves + half) * kFactor + q * 64, d[0][side], d[1][side]);
      }
  }
};

#endif

}  // namespace
}  // namespace pyllm::ISA

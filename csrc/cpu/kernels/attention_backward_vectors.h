// Attention, backward, by fused multiply-adds: a tile of rows against a block of keys.
//
// S' and dP' have queries across the lanes as in the forward pass, and so has dQ' = K' dS'; dV = P' dO and dK = dS' Q
// have elements of the head across them.
#pragma once
#include "cpu/kernels/attention_backward.h"

namespace pyllm::ISA {
namespace {

template <class T>
class VectorWork {
 public:
  static constexpr int64_t kRows = 64, kPanels = kRows / kLanes;  // of a tile
  float* dq;                                                      // [panel][dim_step][kLanes]

  static int64_t most_rows(const AttentionArgs&) { return kRows; }

  explicit VectorWork(const Gradients<T>& gradients, int64_t = kRows) : g(gradients), a(g.a) {
    const int64_t sizes[] = {kRows * a.dim,
                             kRows * a.value_dim,
                             kRows * g.dim_step,
                             kRows * g.value_step,
                             kRows,
                             kRows,
                             kRows * g.dim_step,
                             round_up(kKeys * a.dim, 16),
                             round_up(kKeys * a.value_dim, 16),
                             kKeys * kRows,
                             kKeys * kRows,
                             kKeys * kRows};
    float** const places[] = {&queries_t, &dout_t, &queries, &dout,    &lse,     &level,
                              &dq,        &keys,   &values,  &weights, &dscores, &capped};
    int64_t total = 0;
    for (int64_t n : sizes) total += n;
    auto* p = static_cast<float*>(cpu::scratch(total * sizeof(float), 1));
    for (int i = 0; i < 12; i++) {
      *places[i] = p;
      p += sizes[i];
    }
  }

  // What the queries carry beyond their scale.
  float key_factor() const { return a.softcap > 0 ? 1.0f : kLn2; }

  void load_rows(const RowTile& t, bool by_rows) {
    const float factor = query_factor(a);
    for (int64_t i = 0; i < t.rows.count; i += kLanes) {
      const Panel& p = t.panels[i / kLanes];
      pack_panel_rows(p, a.dim, factor, queries_t + i * a.dim, [&](int64_t l) { return g.query(t.rows, p, l); });
      pack_panel_rows(p, a.value_dim, 1.0f, dout_t + i * a.value_dim, [&](int64_t l) { return g.dout(t.rows, p, l); });
      g.load_statistics(t.rows, p, lse + i, level + i);
      for (int64_t l = 0; by_rows && l < p.count; l++) {
        copy_rows(Stored<T>{g.query(t.rows, p, l), 0, a.dim}, 1, factor, queries + (i + l) * g.dim_step, g.dim_step);
        copy_rows(Stored<T>{g.dout(t.rows, p, l), 0, a.value_dim}, 1, 1.0f, dout + (i + l) * g.value_step,
                  g.value_step);
      }
    }
  }

  void load_block(const Rows& rows, int64_t first, Range) {
    set_block(a, rows, first, block);
    copy_rows(stored_keys<T>(a, rows, first), block.count, 1.0f, keys, a.dim);
    copy_rows(stored_values<T>(a, rows, first), block.count, 1.0f, values, a.value_dim);
  }

  // The tile against the block: dq, the block's dk and dv, the bias's tile dbias[key][kRows], each where it is wanted.
  void step(const RowTile& t, bool want_dq, float* dk, float* dv, float* dbias = nullptr) {
    const V ones[2] = {set(1.0f), set(1.0f)};
    Range panels{kPanels, 0}, seen{kKeys, 0}, live[kPanels];
    for (int64_t i = 0; i * kLanes < t.rows.count; i++) {
      live[i] = live_keys(a, t.panels[i], block);
      if (live[i].lo == live[i].hi) continue;
      panels = {std::min(panels.lo, i), i + 1};
      seen = {std::min(seen.lo, live[i].lo), std::max(seen.hi, live[i].hi)};
    }
    for (int64_t i = panels.lo; i < panels.hi; i++) {
      if (live[i].lo < live[i].hi) panel_gradients(t, i, live[i], dbias);
      for (int64_t j = seen.lo; j < seen.hi; j++) {
        if (j >= live[i].lo && j < live[i].hi) continue;
        std::fill_n(weights + j * kRows + i * kLanes, kLanes, 0.0f);
        std::fill_n(dscores + j * kRows + i * kLanes, kLanes, 0.0f);
      }
      if (want_dq && live[i].lo < live[i].hi)
        multiply(t.panels[i].vectors, keys + live[i].lo * a.dim, 1, a.dim, a.dim, live[i].hi - live[i].lo,
                 dscores + live[i].lo * kRows + i * kLanes, kRows, dq + i * g.dim_step * kLanes, kLanes, ones);
    }
    if (!dk || panels.lo >= panels.hi) return;
    add_rows(t, panels, seen, weights, dout, g.value_step, dv);
    add_rows(t, panels, seen, dscores, queries, g.dim_step, dk);
  }

 private:
  const Gradients<T>& g;
  const AttentionArgs& a;
  float *queries_t, *dout_t, *queries, *dout, *lse, *level;  // _t: by panels; else by rows
  float *keys, *values, *weights, *dscores, *capped;         // of a block; the last three [key][kRows]
  Block block;

  // P and dS of a panel against the block's live keys; dS of the bias is added to dbias.
  void panel_gradients(const RowTile& t, int64_t i, Range live, float* dbias) {
    const Panel& p = t.panels[i];
    float *w = weights + i * kLanes, *ds = dscores + i * kLanes, *cap = capped + i * kLanes;
    score_panel(a, t.rows, p, block, live, keys, queries_t + i * a.dim * kLanes, w, kRows, cap);
    multiply(p.vectors, values + live.lo * a.value_dim, a.value_dim, 1, live.hi - live.lo, a.value_dim,
             dout_t + i * a.value_dim * kLanes, kLanes, ds + live.lo * kRows, kRows, nullptr);
    g.add_dweights(t.rows, p, block, live, ds, kRows);
    for (int64_t v = 0; v < p.vectors * W; v += W) {
      const V total = load(lse + i * kLanes + v), mean = load(level + i * kLanes + v);
      for (int64_t j = live.lo; j < live.hi; j++) {
        const V score = load(w + j * kRows + v), weight = exp2(score - total);
        V d = select(score == -kInfinity, V{}, weight * (load(ds + j * kRows + v) - mean));
        store(w + j * kRows + v, weight);
        if (dbias) store(dbias + j * kRows + i * kLanes + v, load(dbias + j * kRows + i * kLanes + v) + d);
        if (a.softcap > 0) {
          const V c = load(cap + j * kRows + v);
          d = d * ((1.0f - c * c) * a.softcap);
        }
        store(ds + j * kRows + v, d);
      }
    }
  }

  // sums[key][step] += x[key][kRows] rows[row][step], over rows of the panels, keys of `live`.
  void add_rows(const RowTile& t, Range panels, Range live, const float* x, const float* rows, int64_t step,
                float* sums) const {
    const int64_t first = panels.lo * kLanes, count = std::min(panels.hi * kLanes, t.rows.count) - first;
    const V ones[2] = {set(1.0f), set(1.0f)};
    for (int64_t d = 0; d < step; d += kLanes)
      multiply(step - d >= kLanes ? 2 : 1, x + live.lo * kRows + first, kRows, 1, live.hi - live.lo, count,
               rows + first * step + d, step, sums + live.lo * step + d, step, ones);
  }
};

}  // namespace
}  // namespace pyllm::ISA

// What attention's backward pass has whichever way its products are made: a tile of rows, and where its gradients go.
#pragma once
#include "cpu/kernels/attention.h"

namespace pyllm::ISA {
namespace {

constexpr int64_t kMostTileRows = 512;  // of a tile

struct RowTile {
  Rows rows;
  Panel panels[kMostTileRows / kLanes];
  Range keys;  // that some row sees
};

template <class T>
struct Gradients {
  const AttentionBackwardArgs& f;
  const AttentionArgs& a;
  int64_t group, dim_step, value_step;  // steps: rows of gradients, whole vectors
  float* delta;

  explicit Gradients(const AttentionBackwardArgs& args) : f(args), a(args.in) {
    group = a.heads / a.kv_heads;
    dim_step = round_up(a.dim, W);
    value_step = round_up(a.value_dim, W);
    delta = static_cast<float*>(cpu::scratch(a.batch * a.heads * a.queries * sizeof(float), 0));
  }

  int64_t offset(int64_t batch, int64_t head, int64_t query) const {
    return (batch * a.heads + head) * a.queries + query;
  }
  int64_t offset(const Rows& rows, const Panel& p, int64_t lane) const {
    return offset(rows.batch, p.head[lane], p.query[lane]);
  }
  const T* query(const Rows& rows, const Panel& p, int64_t lane) const {
    return row_at<T>(a.q, a.q_step, rows.batch, p.query[lane], p.head[lane]);
  }
  const T* dout(const Rows& rows, const Panel& p, int64_t lane) const {
    return row_at<T>(f.dout, f.dout_step, rows.batch, p.query[lane], p.head[lane]);
  }

  // Rows from `first` on, at most `most`, of `heads` heads from `head` on; whether they see any key.
  bool set_rows(RowTile& t, int64_t batch, int64_t head, int64_t heads, int64_t first, int64_t most) const {
    t.rows = {batch, head, heads, head / group, length_of(a, batch), first, std::min(most, a.queries * heads - first)};
    t.keys = set_panels(a, t.rows, t.panels);
    return t.keys.lo < t.keys.hi;
  }
  // What the scores of a panel's rows are compared with; lanes beyond the last row weigh nothing.
  void load_statistics(const Rows& rows, const Panel& p, float* lse, float* level) const {
    for (int64_t l = 0; l < kLanes; l++) {
      const bool live = l < p.count;
      lse[l] = live ? f.lse[offset(rows, p, l)] : kInfinity;
      level[l] = live ? delta[offset(rows, p, l)] : 0.0f;
    }
  }
  // dP of a panel, dscores[key][step], += the weights' own gradient.
  void add_dweights(const Rows& rows, const Panel& p, const Block& b, Range live, float* dscores, int64_t step) const {
    if (f.dweights)
      add_transposed(p, live, f.dweights, a.dtype, 1, 1.0f, dscores, step,
                     [&](int64_t lane) { return offset(rows, p, lane) * a.keys + b.first; });
  }
  // The sums of a tile's queries, [panel][dim_step][kLanes], times what scores are multiplied by.
  float factor() const { return a.softcap > 0 ? a.scale / a.softcap : a.scale; }
  void write_dq(const RowTile& t, const float* dq) const {
    const V factors[2] = {set(factor()), set(factor())};
    for (int64_t i = 0; i < t.rows.count; i += kLanes) {
      const Panel& p = t.panels[i / kLanes];
      unpack_panel_rows(p, a.dim, factors, dq + i * dim_step, kLanes, [&](int64_t l) {
        return reinterpret_cast<T*>(f.dq) + ((t.rows.batch * a.queries + p.query[l]) * a.heads + p.head[l]) * a.dim;
      });
    }
  }
};

}  // namespace
}  // namespace pyllm::ISA

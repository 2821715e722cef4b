// Attention, backward: from the saved log-sum-exp of each row, tile by tile (64 rows by 64 keys), in memory linear in
// the number of keys and queries. With P the weights and dP = dO V', the gradient of the scores is dS = P (dP - delta),
// delta a row's sum of P dP, which is that of dO O.
//
// S' and dP' have queries across the lanes as in the forward pass, and so has dQ' = K' dS'; dV = P' dO and dK = dS' Q
// have elements of the head across them. dQ is summed over blocks of keys in order, dK and dV over tiles of rows in
// order, a group's heads among them, whichever of two ways is taken: where there are heads enough for the threads, one
// pass over a head does all (five products a tile); else keys' gradients and queries' are two passes, parallel over
// blocks of keys and over tiles of rows (seven products). A bias's gradient is a pass of its own: a tile of dS is
// summed over what the bias is broadcast over, in order.
#include <cstring>
#include <type_traits>

#include "cpu/kernels/attention.h"

namespace pyllm::ISA {
namespace {

constexpr int64_t kRows = 64;  // of a tile
constexpr int64_t kPanels = kRows / kLanes;

float dot_rows(const char* x, DType x_dtype, const char* y, DType y_dtype, int64_t n) {
  V s{};
  with_dtype(x_dtype, [&](auto* x_tag) {
    with_dtype(y_dtype, [&](auto* y_tag) {
      const auto* p = reinterpret_cast<decltype(x_tag)>(const_cast<char*>(x));
      const auto* q = reinterpret_cast<decltype(y_tag)>(const_cast<char*>(y));
      for (int64_t i = 0; i < n; i += W) {
        const int64_t m = std::min<int64_t>(W, n - i);
        s = fma(get(p + i, m), get(q + i, m), s);
      }
    });
  });
  return sum(s);
}

template <class T>
struct Backward {
  const AttentionBackwardArgs& f;
  const AttentionArgs& a;
  int64_t group, tiles, blocks, dim_step, value_step;  // steps: rows of gradients, whole vectors
  float* delta;

  explicit Backward(const AttentionBackwardArgs& args) : f(args), a(args.in) {
    group = a.heads / a.kv_heads;
    tiles = (a.queries * group + kRows - 1) / kRows;
    blocks = (a.keys + kKeys - 1) / kKeys;
    dim_step = round_up(a.dim, W);
    value_step = round_up(a.value_dim, W);
    delta = static_cast<float*>(cpu::scratch(a.batch * a.heads * a.queries * sizeof(float), 0));
  }

  struct Tile {
    Rows rows;
    Panel panels[kPanels];
    Range keys;
    float *queries_t, *dout_t, *queries, *dout, *lse, *delta, *dq;  // _t: by panels; else by rows
    float *keys_at, *values, *weights, *dscores, *capped;           // of a block; the last three [key][kRows]
    Block block;
  };

  int64_t offset(int64_t batch, int64_t head, int64_t query) const {
    return (batch * a.heads + head) * a.queries + query;
  }

  void set_delta() const {
    parallel_for(a.batch * a.queries, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        for (int64_t h = 0; h < a.heads; h++) {
          const int64_t batch = i / a.queries, query = i % a.queries, at = offset(batch, h, query), size = sizeof(T);
          const char* dout = reinterpret_cast<const char*>(row_at<T>(f.dout, f.dout_step, batch, query, h));
          float d = dot_rows(f.out + (i * a.heads + h) * a.value_dim * size, a.dtype, dout, a.dtype, a.value_dim);
          if (f.dweights)
            d += dot_rows(f.weights + at * a.keys * size, a.dtype, f.dweights + at * a.keys * size, a.dtype, a.keys);
          delta[at] = d;
        }
    });
  }

  // Scratch for a tile and a block of keys, on the calling thread.
  void allocate(Tile& t) const {
    const int64_t sizes[] = {kRows * a.dim,
                             kRows * a.value_dim,
                             kRows * dim_step,
                             kRows * value_step,
                             kRows,
                             kRows,
                             kRows * a.dim,
                             round_up(kKeys * a.dim, 16),
                             round_up(kKeys * a.value_dim, 16),
                             kKeys * kRows,
                             kKeys * kRows,
                             kKeys * kRows};
    float** const places[] = {&t.queries_t, &t.dout_t,  &t.queries, &t.dout,    &t.lse,     &t.delta,
                              &t.dq,        &t.keys_at, &t.values,  &t.weights, &t.dscores, &t.capped};
    int64_t total = 0;
    for (int64_t n : sizes) total += n;
    auto* p = static_cast<float*>(cpu::scratch(total * sizeof(float), 1));
    for (int i = 0; i < 12; i++) {
      *places[i] = p;
      p += sizes[i];
    }
  }

  // Rows from `first` on, of `heads` heads from `head` on; whether they see any key.
  bool set_rows(Tile& t, int64_t batch, int64_t head, int64_t heads, int64_t first) const {
    t.rows = {batch, head, heads, head / group, length_of(a, batch), first, std::min(kRows, a.queries * heads - first)};
    t.keys = set_panels(a, t.rows, t.panels);
    return t.keys.lo < t.keys.hi;
  }

  void load_rows(Tile& t, bool by_rows) const {
    const float factor = query_factor(a);
    for (int64_t i = 0; i < t.rows.count; i += kLanes) {
      const Panel& p = t.panels[i / kLanes];
      const auto query = [&](int64_t l) { return row_at<T>(a.q, a.q_step, t.rows.batch, p.query[l], p.head[l]); };
      const auto dout = [&](int64_t l) { return row_at<T>(f.dout, f.dout_step, t.rows.batch, p.query[l], p.head[l]); };
      pack_panel_rows(p, a.dim, factor, t.queries_t + i * a.dim, query);
      pack_panel_rows(p, a.value_dim, 1.0f, t.dout_t + i * a.value_dim, dout);
      for (int64_t l = 0; l < kLanes; l++) {
        const bool live = l < p.count;
        t.lse[i + l] = live ? f.lse[offset(t.rows.batch, p.head[l], p.query[l])] : kInfinity;
        t.delta[i + l] = live ? delta[offset(t.rows.batch, p.head[l], p.query[l])] : 0.0f;
        if (!by_rows || !live) continue;
        copy_rows(Stored<T>{query(l), 0, a.dim}, 1, factor, t.queries + (i + l) * dim_step, dim_step);
        copy_rows(Stored<T>{dout(l), 0, a.value_dim}, 1, 1.0f, t.dout + (i + l) * value_step, value_step);
      }
    }
  }

  void load_block(Tile& t, int64_t first) const {
    set_block(a, t.rows, first, t.block);
    copy_rows(stored_keys<T>(a, t.rows, first), t.block.count, 1.0f, t.keys_at, a.dim);
    copy_rows(stored_values<T>(a, t.rows, first), t.block.count, 1.0f, t.values, a.value_dim);
  }

  // P and dS of a panel against the block's live keys; dS of the bias is added to dbias[key][kRows].
  void panel_gradients(Tile& t, int64_t i, Range live, float* dbias) const {
    const Panel& p = t.panels[i];
    float *weights = t.weights + i * kLanes, *dscores = t.dscores + i * kLanes, *capped = t.capped + i * kLanes;
    score_panel(a, t.rows, p, t.block, live, t.keys_at, t.queries_t + i * a.dim * kLanes, weights, kRows, capped);
    multiply(p.vectors, t.values + live.lo * a.value_dim, a.value_dim, 1, live.hi - live.lo, a.value_dim,
             t.dout_t + i * a.value_dim * kLanes, kLanes, dscores + live.lo * kRows, kRows, nullptr);
    if (f.dweights)
      add_transposed(p, live, f.dweights, a.dtype, 1, 1.0f, dscores, kRows, [&](int64_t lane) {
        return offset(t.rows.batch, p.head[lane], p.query[lane]) * a.keys + t.block.first;
      });
    for (int64_t v = 0; v < p.vectors * W; v += W) {
      const V lse = load(t.lse + i * kLanes + v), level = load(t.delta + i * kLanes + v);
      for (int64_t j = live.lo; j < live.hi; j++) {
        const V score = load(weights + j * kRows + v), w = exp2(score - lse);
        V d = select(score == -kInfinity, V{}, w * (load(dscores + j * kRows + v) - level));
        store(weights + j * kRows + v, w);
        if (dbias) store(dbias + j * kRows + i * kLanes + v, load(dbias + j * kRows + i * kLanes + v) + d);
        if (a.softcap > 0) {
          const V c = load(capped + j * kRows + v);
          d = d * ((1.0f - c * c) * a.softcap);
        }
        store(dscores + j * kRows + v, d);
      }
    }
  }

  // sums[key][step] += x[key][kRows] rows[row][step], over rows of the panels, keys of `live`.
  void add_rows(const Tile& t, Range panels, Range live, const float* x, const float* rows, int64_t step,
                float* sums) const {
    const int64_t first = panels.lo * kLanes, count = std::min(panels.hi * kLanes, t.rows.count) - first;
    const V ones[2] = {set(1.0f), set(1.0f)};
    for (int64_t d = 0; d < step; d += kLanes)
      multiply(step - d >= kLanes ? 2 : 1, x + live.lo * kRows + first, kRows, 1, live.hi - live.lo, count,
               rows + first * step + d, step, sums + live.lo * step + d, step, ones);
  }

  // The tile against the block: dq, the block's dk and dv, the bias's tile, each where it is wanted.
  void step(Tile& t, bool want_dq, float* dk, float* dv, float* dbias) const {
    const V ones[2] = {set(1.0f), set(1.0f)};
    Range panels{kPanels, 0}, keys{kKeys, 0}, live[kPanels];
    for (int64_t i = 0; i * kLanes < t.rows.count; i++) {
      live[i] = live_keys(a, t.panels[i], t.block);
      if (live[i].lo == live[i].hi) continue;
      panels = {std::min(panels.lo, i), i + 1};
      keys = {std::min(keys.lo, live[i].lo), std::max(keys.hi, live[i].hi)};
    }
    for (int64_t i = panels.lo; i < panels.hi; i++) {
      if (live[i].lo < live[i].hi) panel_gradients(t, i, live[i], dbias);
      for (int64_t j = keys.lo; j < keys.hi; j++) {
        if (j >= live[i].lo && j < live[i].hi) continue;
        std::fill_n(t.weights + j * kRows + i * kLanes, kLanes, 0.0f);
        std::fill_n(t.dscores + j * kRows + i * kLanes, kLanes, 0.0f);
      }
      if (want_dq && live[i].lo < live[i].hi)
        multiply(t.panels[i].vectors, t.keys_at + live[i].lo * a.dim, 1, a.dim, a.dim, live[i].hi - live[i].lo,
                 t.dscores + live[i].lo * kRows + i * kLanes, kRows, t.dq + i * a.dim * kLanes, kLanes, ones);
    }
    if (!dk || panels.lo >= panels.hi) return;
    add_rows(t, panels, keys, t.weights, t.dout, value_step, dv);
    add_rows(t, panels, keys, t.dscores, t.queries, dim_step, dk);
  }

  void clear_dq(Tile& t) const { std::fill_n(t.dq, kRows * a.dim, 0.0f); }

  void write_dq(const Tile& t) const {
    const float factor = a.softcap > 0 ? a.scale / a.softcap : a.scale;
    const V factors[2] = {set(factor), set(factor)};
    for (int64_t i = 0; i < t.rows.count; i += kLanes) {
      const Panel& p = t.panels[i / kLanes];
      unpack_panel_rows(p, a.dim, factors, t.dq + i * a.dim, kLanes, [&](int64_t l) {
        return reinterpret_cast<T*>(f.dq) + ((t.rows.batch * a.queries + p.query[l]) * a.heads + p.head[l]) * a.dim;
      });
    }
  }

  void write_keys(int64_t batch, int64_t kv_head, int64_t first, int64_t count, const float* dk,
                  const float* dv) const {
    const float factor = a.softcap > 0 ? 1.0f : kLn2;  // what the queries carry beyond their scale
    for (int64_t j = 0; j < count; j++) {
      const int64_t row = (batch * a.keys + first + j) * a.kv_heads + kv_head;
      for (int64_t d = 0; d < a.dim; d += W)
        write(reinterpret_cast<T*>(f.dk) + row * a.dim + d, load(dk + j * dim_step + d) * factor,
              std::min<int64_t>(W, a.dim - d));
      for (int64_t d = 0; d < a.value_dim; d += W)
        write(reinterpret_cast<T*>(f.dv) + row * a.value_dim + d, load(dv + j * value_step + d),
              std::min<int64_t>(W, a.value_dim - d));
    }
  }

  float* clear_keys(int64_t count) const {
    const int64_t floats = count * (dim_step + value_step);
    auto* p = static_cast<float*>(cpu::scratch(floats * sizeof(float) + 64, 2));
    std::fill_n(p, floats, 0.0f);
    return p;
  }

  void heads_at_once() const {
    parallel_for(a.batch * a.kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t batch = i / a.kv_heads, kv_head = i % a.kv_heads;
        float *dk = clear_keys(a.keys), *dv = dk + a.keys * dim_step;
        Tile t;
        allocate(t);
        for (int64_t tile = 0; tile < tiles; tile++) {
          clear_dq(t);
          if (set_rows(t, batch, kv_head * group, group, tile * kRows)) {
            load_rows(t, true);
            for (int64_t k = t.keys.lo / kKeys * kKeys; k < t.keys.hi; k += kKeys) {
              load_block(t, k);
              step(t, f.dq, dk + k * dim_step, dv + k * value_step, nullptr);
            }
          }
          if (f.dq) write_dq(t);
        }
        write_keys(batch, kv_head, 0, a.keys, dk, dv);
      }
    });
  }

  void gradients_of_keys() const {
    parallel_for(a.batch * a.kv_heads * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t head = i / blocks, first = i % blocks * kKeys, batch = head / a.kv_heads,
                      kv_head = head % a.kv_heads;
        float *dk = clear_keys(kKeys), *dv = dk + kKeys * dim_step;
        Tile t;
        allocate(t);
        bool loaded = false;
        for (int64_t tile = 0; tile < tiles; tile++) {
          if (!set_rows(t, batch, kv_head * group, group, tile * kRows) || !t.keys.meets(first, first + kKeys))
            continue;
          if (!loaded) load_block(t, first);
          loaded = true;
          load_rows(t, true);
          step(t, false, dk, dv, nullptr);
        }
        write_keys(batch, kv_head, first, std::min(kKeys, a.keys - first), dk, dv);
      }
    });
  }

  void gradients_of_queries() const {
    parallel_for(a.batch * a.kv_heads * tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t head = i / tiles, tile = tiles - 1 - i % tiles;  // the longest first
        Tile t;
        allocate(t);
        clear_dq(t);
        if (set_rows(t, head / a.kv_heads, head % a.kv_heads * group, group, tile * kRows)) {
          load_rows(t, false);
          for (int64_t k = t.keys.lo / kKeys * kKeys; k < t.keys.hi; k += kKeys) {
            load_block(t, k);
            step(t, true, nullptr, nullptr, nullptr);
          }
        }
        write_dq(t);
      }
    });
  }

  void gradient_of_bias() const {
    const int64_t* size = f.dbias_size;
    const int64_t query_tiles = (a.queries + kRows - 1) / kRows;
    const int64_t all[] = {a.batch, a.heads, query_tiles, blocks};
    const int64_t tasks[] = {size[0], size[1], size[2] == 1 ? 1 : query_tiles, size[3] == 1 ? 1 : blocks};
    parallel_for(tasks[0] * tasks[1] * tasks[2] * tasks[3], 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t index[] = {i / tasks[3] / tasks[2] / tasks[1], i / tasks[3] / tasks[2] % tasks[1],
                                 i / tasks[3] % tasks[2], i % tasks[3]};
        Range over[4];  // this task's part of each axis: all of it where the bias is broadcast
        for (int x = 0; x < 4; x++) over[x] = tasks[x] == 1 ? Range{0, all[x]} : Range{index[x], index[x] + 1};
        auto* sums = static_cast<float*>(cpu::scratch(kKeys * kRows * sizeof(float), 2));
        std::fill_n(sums, kKeys * kRows, 0.0f);
        Tile t;
        allocate(t);
        for (int64_t batch = over[0].lo; batch < over[0].hi; batch++)
          for (int64_t head = over[1].lo; head < over[1].hi; head++)
            for (int64_t tile = over[2].lo; tile < over[2].hi; tile++) {
              if (!set_rows(t, batch, head, 1, tile * kRows)) continue;
              if (!t.keys.meets(over[3].lo * kKeys, over[3].hi * kKeys)) continue;
              load_rows(t, false);
              for (int64_t block = over[3].lo; block < over[3].hi; block++) {
                if (!t.keys.meets(block * kKeys, (block + 1) * kKeys)) continue;
                load_block(t, block * kKeys);
                step(t, false, nullptr, nullptr, sums);
              }
            }
        write_bias(index, sums);
      }
    });
  }

  // One tile of dS to the bias's elements: down the axes that it is broadcast over.
  void write_bias(const int64_t* index, float* sums) const {
    const int64_t* size = f.dbias_size;
    const int64_t rows = size[2] == 1 ? 1 : std::min(kRows, a.queries - index[2] * kRows);
    const int64_t keys = size[3] == 1 ? 1 : std::min(kKeys, a.keys - index[3] * kKeys);
    if (size[2] == 1)
      for (int64_t j = 0; j < kKeys; j++)
        for (int64_t r = 1; r < kRows; r++) sums[j * kRows] += sums[j * kRows + r];
    if (size[3] == 1)
      for (int64_t j = 1; j < kKeys; j++)
        for (int64_t r = 0; r < rows; r++) sums[r] += sums[j * kRows + r];
    with_dtype(a.bias_dtype, [&](auto* tag) {
      auto* out = reinterpret_cast<decltype(tag)>(f.dbias) +
                  ((index[0] * size[1] + index[1]) * size[2] + index[2] * kRows) * size[3] + index[3] * kKeys;
      for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < keys; j++) put(out + r * size[3] + j, sums[j * kRows + r]);
    });
  }

  void run() const {
    set_delta();
    const int64_t heads = a.batch * a.kv_heads, threads = cpu::num_threads();
    if (f.dk) {
      // Products a thread waits for: five for each of its heads, or its share of seven.
      if ((heads + threads - 1) / threads * 5 * threads <= 7 * heads) {
        heads_at_once();
      } else {
        gradients_of_keys();
        if (f.dq) gradients_of_queries();
      }
    } else if (f.dq) {
      gradients_of_queries();
    }
    if (f.dbias) gradient_of_bias();
  }
};

}  // namespace

void attention_backward(const AttentionBackwardArgs& f) {
  if (f.in.heads == 0) {  // then a bias has one head, for none
    int64_t bytes = f.dbias ? size_of(f.in.bias_dtype) : 0;
    for (const int64_t size : f.dbias_size) bytes *= size;
    if (bytes) std::memset(f.dbias, 0, bytes);
    return;
  }
  with_dtype(f.in.dtype, [&](auto* tag) { Backward<std::remove_pointer_t<decltype(tag)>>(f).run(); });
}

}  // namespace pyllm::ISA

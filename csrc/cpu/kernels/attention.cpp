// Attention, forward: an online softmax over blocks of 64 keys, the state of a row being its maximum, its sum and its
// output so far. Memory is linear in the number of keys and queries.
//
// Keys are cut into splits of kSplit, each walked from an empty state, and the states are merged in order. That is so
// in every call, whether one thread takes all splits of a tile of queries or, where there are few queries, each thread
// some of them; so a row has the same bits in a full pass, in any chunk of it, and alone over the keys so far. A page
// of keys holds whole blocks: where the blocks lie changes no bit.
//
// Two ways to walk a split add in the same order. Many rows: panels, see kernels/attention.h. Less than W rows (one
// query of a group of heads): see kernels/attention_rows.h. bf16 on tile registers: kernels/attention_tiles.h, both.
//
// Keys and values of int8 pages: with dot products of bytes see kernels/attention_bytes.h, whose rows are always few, or,
// of the same bits for many rows, kernels/attention_byte_tiles.h.
// Elsewhere keys and values of int8 pages become floats, number times scale, on their way: the bits are those of such
// floats in memory.
#include <type_traits>

#include "cpu/kernels/attention_byte_tiles.h"
#include "cpu/kernels/attention_rows.h"
#include "cpu/kernels/attention_tiles.h"

namespace pyllm::ISA {
namespace {

constexpr int64_t kSplit = 512;

// ---- Many rows.

// sums[d][lane] * factor, plus the values of the keys that are not marked by a negative p: values may be infinite.
void add_marked(const Panel& p, Range live, int64_t dim, const float* s, const float* values, float* sums,
                const V* factor) {
  for (int64_t d = 0; d < dim; d++)
    for (int64_t v = 0; v < p.vectors; v++) {
      V x = load(sums + d * kLanes + v * W) * factor[v];
      for (int64_t j = live.lo; j < live.hi; j++) {
        const V w = load(s + j * kLanes + v * W);
        x = select(w < 0.0f, x, fma(w, set(values[j * dim + d]), x));
      }
      store(sums + d * kLanes + v * W, x);
    }
}

template <bool kMark>
VEC void exponentials(const Panel& p, Range live, float* s, float* max, float* total, V* factor) {
  for (int64_t v = 0; v < p.vectors; v++) {
    const V old_max = load(max + v * W);
    V m = old_max;
    for (int64_t j = live.lo; j < live.hi; j++) m = pyllm::ISA::max(load(s + j * kLanes + v * W), m);
    factor[v] = rescale(old_max, m);
    const V base = finite_or_zero(m);
    V sum = load(total + v * W) * factor[v];
    for (int64_t j = live.lo; j < live.hi; j++) {
      float* at = s + j * kLanes + v * W;
      const V x = load(at), e = exp2(x - base);
      sum = sum + e;
      store(at, kMark ? select(x == -kInfinity, set(-1.0f), e) : e);
    }
    store(max + v * W, m);
    store(total + v * W, sum);
  }
}

struct Buffers {
  float *queries, *keys, *values, *scores;
  float* panels;  // of keys, where rows are few
};

template <class S>
void walk_panels(const AttentionArgs& a, const Rows& rows, const Panel* panels, const Buffers& w, Range keys, State s) {
  for (int64_t first = keys.lo; first < keys.hi; first += kKeys) {
    Block block;
    set_block(a, rows, first, block);
    bool loaded = false, finite = true;
    for (int64_t i = 0; i * kLanes < rows.count; i++) {
      const Panel& p = panels[i];
      const Range live = live_keys(a, p, block);
      if (live.lo == live.hi) continue;
      if (!loaded) {
        copy_rows(stored_keys<S>(a, rows, first), block.count, 1.0f, w.keys, a.dim);
        finite = copy_rows(stored_values<S>(a, rows, first), block.count, 1.0f, w.values, a.value_dim);
        loaded = true;
      }
      const bool mark =
          score_panel(a, rows, p, block, live, w.keys, w.queries + i * a.dim * kLanes, w.scores, kLanes, nullptr) &&
          !finite;
      V factor[2];
      float* sums = s.sums + i * a.value_dim * kLanes;
      (mark ? exponentials<true> : exponentials<false>)(p, live, w.scores, s.max + i * kLanes, s.total + i * kLanes,
                                                        factor);
      if (mark)
        add_marked(p, live, a.value_dim, w.scores, w.values, sums, factor);
      else
        multiply(p.vectors, w.values + live.lo * a.value_dim, 1, a.value_dim, a.value_dim, live.hi - live.lo,
                 w.scores + live.lo * kLanes, kLanes, sums, kLanes, factor);
    }
  }
}

// ---- Tiles of rows over splits of keys.

// `part` joins `all`; each has `rows` rounded up to whole panels.
void merge(bool few, int64_t rows, int64_t sums_step, State part, State all) {
  alignas(64) float keep[kMaxRows], join[kMaxRows];
  for (int64_t i = 0; i < rows; i += W) {
    const V old_max = load(all.max + i), new_max = load(part.max + i), m = max(old_max, new_max);
    const V k = rescale(old_max, m), j = rescale(new_max, m);
    store(keep + i, k);
    store(join + i, j);
    store(all.max + i, m);
    store(all.total + i, fma(load(part.total + i), j, load(all.total + i) * k));
  }
  if (few) {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t d = 0; d < sums_step; d += W) {
        float* at = all.sums + i * sums_step + d;
        store(at, fma(load(part.sums + i * sums_step + d), set(join[i]), load(at) * set(keep[i])));
      }
    return;
  }
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t d = i * sums_step; d < (i + kLanes) * sums_step; d += kLanes)
      for (int64_t v = 0; v < kLanes; v += W) {
        float* at = all.sums + d + v;
        store(at, fma(load(part.sums + d + v), load(join + i + v), load(at) * load(keep + i + v)));
      }
}

template <class T, class S>
struct Forward {  // of queries of T, and keys and values that are stored as S
  const AttentionForwardArgs& f;
  const AttentionArgs& a;
  int64_t group, all_rows, tile_rows, tiles_per_head, tiles, splits;
  bool few, on_tiles, on_bytes, on_byte_tiles;
  int64_t sums_step;  // of a row, or, of many, in panels

  explicit Forward(const AttentionForwardArgs& args) : f(args), a(args.in) {
    group = a.heads / a.kv_heads;
    all_rows = a.queries * group;
    on_tiles = takes_tiles(a);
    on_bytes = takes_bytes(a);
    on_byte_tiles = takes_byte_tiles(a);
    few = (on_bytes && !on_byte_tiles) || all_rows < W;
    sums_step = on_tiles ? round_up(a.value_dim + 1, W) : few ? round_up(a.value_dim, W) : a.value_dim;
    const int64_t most = !on_tiles && !on_bytes && a.dim + a.value_dim > 256 ? kMaxRows / 2 : kMaxRows;
    tile_rows = !few ? most : on_bytes ? std::min(all_rows, kByteRows) : all_rows;
    const int64_t many = 4 * cpu::num_threads(), heads = a.batch * a.kv_heads;
    const auto count = [&] { return (all_rows + tile_rows - 1) / tile_rows; };
    while (!few && tile_rows > kLanes && heads * count() < many) tile_rows /= 2;
    tiles_per_head = count();
    tiles = heads * tiles_per_head;
    int64_t longest = 0;
    for (int64_t b = 0; b < a.batch; b++) longest = std::max(longest, length_of(a, b));
    splits = std::max<int64_t>(1, (longest + kSplit - 1) / kSplit);
  }

  bool one_tile() const { return few && tiles_per_head == 1; }  // of a head: those of a sequence are walked together

  // In floats, of whole panels.
  int64_t padded_rows() const { return few ? kLanes : round_up(tile_rows, kLanes); }
  int64_t sums_size() const { return (few ? tile_rows : round_up(tile_rows, kLanes)) * sums_step; }
  int64_t state_size() const { return round_up(2 * padded_rows() + sums_size(), 16); }
  State state_at(float* p) const { return {p, p + padded_rows(), p + 2 * padded_rows()}; }

  struct Tile {
    Rows rows;
    Panel* panels;
    Range keys;
    Buffers buffers;
    TileBuffers tile_buffers;
    ByteBuffers byte_buffers;
    ByteTileBuffers byte_tile_buffers;
    State all, part;
  };

  int64_t panels_bytes() const { return round_up((few ? 1 : kMaxRows / kLanes) * sizeof(Panel), 64); }
  int64_t queries_bytes() const {
    if (on_byte_tiles) return byte_tile_query_bytes(a, padded_rows());
    if (on_bytes) return byte_query_bytes(a, tile_rows);
    if (on_tiles) return tile_query_bytes(a, few ? tile_rows : padded_rows());
    return round_up(padded_rows() * a.dim * sizeof(float), 64);
  }
  int64_t tile_bytes() const { return panels_bytes() + queries_bytes() + 2 * state_size() * sizeof(float); }
  int64_t work_bytes() const {  // of one thread: a block of keys and values, and its scores
    if (on_byte_tiles) return byte_tile_buffer_bytes(a);
    if (on_bytes) return byte_buffer_bytes(a);
    if (on_tiles) return tile_buffer_bytes(a);
    const int64_t blocks = round_up(kKeys * a.dim, 16) + round_up(kKeys * a.value_dim, 16);
    return (!few ? blocks + kKeys * kLanes : (Stored<S>::kScaled ? blocks : 0) + kKeys * a.dim) * sizeof(float);
  }

  // `own` is tile_bytes() and `work` work_bytes() long.
  void start(int64_t index, char* own, char* work, Tile& t) const {
    // The last queries of a head first: under a causal mask they take longest.
    const int64_t head = index / tiles_per_head, first = (tiles_per_head - 1 - index % tiles_per_head) * tile_rows;
    t.rows = {head / a.kv_heads,
              head % a.kv_heads * group,
              group,
              head % a.kv_heads,
              length_of(a, head / a.kv_heads),
              first,
              std::min(tile_rows, all_rows - first)};
    t.panels = reinterpret_cast<Panel*>(own);
    t.keys = set_panels(a, t.rows, t.panels);
    char* queries = own + panels_bytes();
    auto* states = reinterpret_cast<float*>(queries + queries_bytes());
    t.all = state_at(states);
    t.part = state_at(states + state_size());
    if (on_byte_tiles) {
      t.byte_tile_buffers = byte_tile_buffers_at(a, queries, padded_rows(), work);
    } else if (on_bytes) {
      t.byte_buffers = byte_buffers_at(a, queries, tile_rows, work);
    } else if (on_tiles) {
      t.tile_buffers = tile_buffers_at(a, queries, work);
    } else {
      auto* keys = reinterpret_cast<float*>(work);
      float* values = keys + round_up(kKeys * a.dim, 16);
      float* rest = values + round_up(kKeys * a.value_dim, 16);
      t.buffers = {reinterpret_cast<float*>(queries), keys, values, rest, few && !Stored<S>::kScaled ? keys : rest};
    }
  }

  void load_queries(Tile& t) const {
    const auto row_of = [&](const Panel& p) {
      return [&](int64_t lane) { return row_at<T>(a.q, a.q_step, t.rows.batch, p.query[lane], p.head[lane]); };
    };
    if (on_byte_tiles)
      for (int64_t i = 0; i * kLanes < t.rows.count; i++)
        pack_byte_tile_queries(a, t.panels[i], i, t.byte_tile_buffers, row_of(t.panels[i]));
    else if (on_bytes)
      for (int64_t i = 0; i < t.rows.count; i++) pack_byte_query(a, row_of(t.panels[0])(i), i, t.byte_buffers);
    else if (on_tiles)
      for (int64_t i = 0; i * kLanes < t.rows.count; i++)
        pack_tile_queries(a, t.rows, t.panels[i], few, i, t.tile_buffers);
    else if (few)
      for (int64_t i = 0; i < t.rows.count; i++)
        copy_rows(Stored<T>{row_of(t.panels[0])(i), 0, a.dim}, 1, query_factor(a), t.buffers.queries + i * a.dim,
                  a.dim);
    else
      for (int64_t i = 0; i * kLanes < t.rows.count; i++)
        pack_panel_rows(t.panels[i], a.dim, query_factor(a), t.buffers.queries + i * a.dim * kLanes,
                        row_of(t.panels[i]));
  }

  // One split for `count` tiles: one of many rows, or some of few, the heads of a sequence, block by block together, as
  // they lie side by side in memory.
  void walk(const Tile* t, int64_t count, int64_t split, State Tile::* state) const {
    for (int64_t i = 0; i < count; i++) {
      const State& s = t[i].*state;
      std::fill_n(s.max, padded_rows(), -kInfinity);
      std::fill_n(s.total, padded_rows() + sums_size(), 0.0f);
    }
    const Range keys{std::max(split * kSplit, t->keys.lo / kKeys * kKeys), std::min((split + 1) * kSplit, t->keys.hi)};
    if (keys.lo >= keys.hi) return;
    if (!few) {
      if (on_byte_tiles)
        walk_byte_panels(a, t->rows, t->panels, t->byte_tile_buffers, keys, t->*state);
      else if (on_tiles)
        walk_tile_panels(a, t->rows, t->panels, t->tile_buffers, keys, sums_step, t->*state);
      else
        walk_panels<S>(a, t->rows, t->panels, t->buffers, keys, t->*state);
      return;
    }
    for (int64_t first = keys.lo; first < keys.hi; first += kKeys)
      for (int64_t i = 0; i < count; i++) {
        const Rows& rows = t[i].rows;
        const Panel& panel = t[i].panels[0];
        const Buffers& b = t[i].buffers;
        const Ahead ahead = ahead_of(t, count, i, first, keys.hi);
        if (on_bytes) {
          walk_bytes(a, rows, panel, t[i].byte_buffers, first, ahead, sums_step, t[i].*state);
        } else if (on_tiles) {
          walk_tile_rows(a, rows, panel, t[i].tile_buffers, first, ahead, sums_step, t[i].*state);
        } else {
          const Stored<S> k = stored_keys<S>(a, rows, first), v = stored_values<S>(a, rows, first);
          if constexpr (Stored<S>::kScaled)
            walk_rows(a, rows, panel, b.queries, first, k, v, b.keys, b.values, b.panels, t[i].*state);
          else
            walk_rows(a, rows, panel, b.queries, first, k, v, b.panels, ahead, t[i].*state);
        }
      }
    for (int64_t i = 0; on_tiles && i < count; i++) end_tile_rows(a, t[i].rows.count, sums_step, t[i].*state);
  }

  // What follows on the block of keys from `first` on of tile i of `count`: that of the next, or the next block.
  Ahead ahead_of(const Tile* t, int64_t count, int64_t i, int64_t first, int64_t end) const {
    const bool last = i + 1 == count;
    const Rows& rows = t[last ? 0 : i + 1].rows;
    const int64_t then = last ? first + kKeys : first, keys = std::min(kKeys, end - then);
    if (then >= end) return {};
    return {runs_of(stored_keys<S>(a, rows, then), keys), runs_of(stored_values<S>(a, rows, then), keys)};
  }

  void merge_into(const Tile& t, State part, State all) const {
    merge(few, few ? t.rows.count : round_up(t.rows.count, kLanes), sums_step, part, all);
  }

  void finish(const Tile& t, State s) const {
    T* out = reinterpret_cast<T*>(f.out);
    for (int64_t i = 0; i < t.rows.count; i += kLanes) {
      const Panel& p = t.panels[i / kLanes];
      const auto row_of = [&](int64_t lane) {
        return out + ((t.rows.batch * a.queries + p.query[lane]) * a.heads + p.head[lane]) * a.value_dim;
      };
      V factor[2];
      alignas(64) float lse[kLanes];
      for (int64_t v = 0; v < 2; v++) {
        const V total = load(s.total + i + v * W), m = load(s.max + i + v * W);
        factor[v] = select(total == 0.0f, V{}, 1.0f / total);
        store(lse + v * W, select(total == 0.0f, set(kInfinity), fma(log(total), set(kLog2e), m)));
      }
      if (few)
        for (int64_t l = 0; l < p.count; l++) copy_to(s.sums + l * sums_step, factor[l / W][l % W], row_of(l));
      else
        unpack_panel_rows(p, a.value_dim, factor, s.sums + i * sums_step, kLanes, row_of);
      if (f.lse)
        for (int64_t l = 0; l < p.count; l++)
          f.lse[(t.rows.batch * a.heads + p.head[l]) * a.queries + p.query[l]] = lse[l];
    }
  }

  void copy_to(const float* sums, float factor, T* out) const {
    for (int64_t d = 0; d < a.value_dim; d += W)
      write(out + d, load(sums + d) * factor, std::min<int64_t>(W, a.value_dim - d));
  }

  void run() const {
    const int64_t threads = cpu::num_threads(), least = threads > 1 ? 4 * threads : 1;
    const bool together = one_tile();
    const bool apart = splits > 1 && threads > 1 && (together ? a.batch : tiles) < least;  // the splits of a tile
    const int64_t pieces = apart ? splits : 1;
    const int64_t shares = std::clamp<int64_t>((least + a.batch * pieces - 1) / (a.batch * pieces), 1,
                                               a.kv_heads);  // of a sequence's heads
    const int64_t groups = together ? a.batch * shares : tiles;
    const auto group_at = [&](int64_t g, int64_t& first, int64_t& count) {
      const int64_t heads = g / shares * a.kv_heads, share = g % shares;
      first = together ? heads + a.kv_heads * share / shares : g;
      count = together ? heads + a.kv_heads * (share + 1) / shares - first : 1;
    };
    auto* states =
        apart ? static_cast<float*>(cpu::scratch(tiles * splits * state_size() * sizeof(float), 0)) : nullptr;
    parallel_for(groups * pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        int64_t first, count;
        group_at(i / pieces, first, count);
        const int64_t list_bytes = round_up(count * sizeof(Tile), 64);
        auto* memory = static_cast<char*>(cpu::scratch(list_bytes + count * tile_bytes() + work_bytes(), 1));
        auto* t = reinterpret_cast<Tile*>(memory);
        char* own = memory + list_bytes;
        for (int64_t n = 0; n < count; n++) {
          start(first + n, own + n * tile_bytes(), own + count * tile_bytes(), t[n]);
          load_queries(t[n]);
          if (apart) t[n].all = state_at(states + ((first + n) * splits + i % pieces) * state_size());
        }
        if (apart) {
          walk(t, count, i % pieces, &Tile::all);
          continue;
        }
        walk(t, count, t->keys.lo / kSplit, &Tile::all);
        for (int64_t split = t->keys.lo / kSplit + 1; split * kSplit < t->keys.hi; split++) {
          walk(t, count, split, &Tile::part);
          for (int64_t n = 0; n < count; n++) merge_into(t[n], t[n].part, t[n].all);
        }
        for (int64_t n = 0; n < count; n++) finish(t[n], t[n].all);
      }
    });
    if (!apart) return;
    parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        Tile t;
        auto* own = static_cast<char*>(cpu::scratch(tile_bytes() + work_bytes(), 1));
        start(i, own, own + tile_bytes(), t);
        const State all = state_at(states + i * splits * state_size());
        for (int64_t split = 1; split < splits; split++)
          merge_into(t, state_at(states + (i * splits + split) * state_size()), all);
        finish(t, all);
      }
    });
  }

  // The weights from the saved log-sum-exp, by panels whatever the number of rows: the scores are the same bits.
  void write_weights() const {
    constexpr int64_t rows_at_once = kMaxRows;
    const int64_t per_head = (all_rows + rows_at_once - 1) / rows_at_once;
    parallel_for(a.batch * a.kv_heads * per_head, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t head = i / per_head, batch = head / a.kv_heads, first = i % per_head * rows_at_once;
        const Rows rows{batch,
                        head % a.kv_heads * group,
                        group,
                        head % a.kv_heads,
                        length_of(a, batch),
                        first,
                        std::min(rows_at_once, all_rows - first)};
        auto* keys = static_cast<float*>(
            cpu::scratch((round_up(kKeys * a.dim, 16) + kKeys * kLanes + kMaxRows * a.dim) * sizeof(float), 1));
        float *scores = keys + round_up(kKeys * a.dim, 16), *queries = scores + kKeys * kLanes;
        Panel panels[kMaxRows / kLanes];
        set_panels(a, rows, panels);
        const auto weights_of = [&](const Panel& p, int64_t lane) {
          return reinterpret_cast<T*>(f.weights) +
                 ((batch * a.heads + p.head[lane]) * a.queries + p.query[lane]) * a.keys;
        };
        for (int64_t r = 0; r < rows.count; r += kLanes) {
          const Panel& p = panels[r / kLanes];
          for (int64_t l = 0; l < p.count; l++) std::fill_n(weights_of(p, l), a.keys, T{});
          pack_panel_rows(p, a.dim, query_factor(a), queries + r * a.dim,
                          [&](int64_t lane) { return row_at<T>(a.q, a.q_step, batch, p.query[lane], p.head[lane]); });
        }
        for (int64_t k = 0; k < rows.length; k += kKeys) {
          Block block;
          set_block(a, rows, k, block);
          copy_rows(stored_keys<S>(a, rows, k), block.count, 1.0f, keys, a.dim);
          for (int64_t r = 0; r < rows.count; r += kLanes) {
            const Panel& p = panels[r / kLanes];
            const Range live = live_keys(a, p, block);
            if (live.lo == live.hi) continue;
            score_panel(a, rows, p, block, live, keys, queries + r * a.dim, scores, kLanes, nullptr);
            alignas(64) float lse[kLanes];
            for (int64_t l = 0; l < kLanes; l++) lse[l] = f.lse[(batch * a.heads + p.head[l]) * a.queries + p.query[l]];
            for (int64_t j = live.lo; j < live.hi; j++)
              for (int64_t v = 0; v < p.vectors * W; v += W)
                store(scores + j * kLanes + v, exp2(load(scores + j * kLanes + v) - load(lse + v)));
            const V ones[2] = {set(1.0f), set(1.0f)};
            unpack_panel_rows(p, live.hi - live.lo, ones, scores + live.lo * kLanes, kLanes,
                              [&](int64_t lane) { return weights_of(p, lane) + k + live.lo; });
          }
        }
      }
    });
  }
};

template <class T, class S>
void run(const AttentionForwardArgs& f) {
  const Forward<T, S> forward(f);
  forward.run();
  if (f.weights) forward.write_weights();
}

}  // namespace

void attention_forward(const AttentionForwardArgs& f) {
  if (f.in.batch * f.in.queries * f.in.heads == 0) return;
  with_dtype(f.in.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    f.in.stored == DType::i8 ? run<T, int8_t>(f) : run<T, T>(f);
  });
}

}  // namespace pyllm::ISA

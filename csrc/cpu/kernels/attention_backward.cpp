// Attention, backward: from the saved log-sum-exp of each row, tile by tile (some rows by 64 keys), in memory linear in
// the number of keys and queries. With P the weights and dP = dO V', the gradient of the scores is dS = P (dP - delta),
// delta a row's sum of P dP, which is that of dO O.
//
// A tile's products are made on the tile registers where the processor has them (attention_backward_tiles.h), else by
// vectors (attention_backward_vectors.h). dQ is summed over blocks of keys in order, dK and dV over rows in order, a
// group's heads among them, whichever of two ways is taken: where there are heads enough for the threads, one pass over a
// head does all (five products a tile); else keys' gradients and queries' are two passes, parallel over blocks of keys
// and over tiles of rows (seven products). A bias's gradient is a pass of its own: a tile of dS is summed over what the
// bias is broadcast over, in order.
#include <cstring>
#include <type_traits>

#include "cpu/kernels/attention_backward_tiles.h"
#include "cpu/kernels/attention_backward_vectors.h"

namespace pyllm::ISA {
namespace {

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
struct BiasGradient : Gradients<T> {
  using Gradients<T>::f, Gradients<T>::a;
  static constexpr int64_t kRows = VectorWork<T>::kRows;

  void run() const {
    const int64_t* size = f.dbias_size;
    const int64_t query_tiles = (a.queries + kRows - 1) / kRows;
    const int64_t blocks = (a.keys + kKeys - 1) / kKeys;
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
        VectorWork<T> work(*this);
        RowTile t;
        for (int64_t batch = over[0].lo; batch < over[0].hi; batch++)
          for (int64_t head = over[1].lo; head < over[1].hi; head++)
            for (int64_t tile = over[2].lo; tile < over[2].hi; tile++) {
              if (!this->set_rows(t, batch, head, 1, tile * kRows, kRows)) continue;
              if (!t.keys.meets(over[3].lo * kKeys, over[3].hi * kKeys)) continue;
              work.load_rows(t, false);
              for (int64_t block = over[3].lo; block < over[3].hi; block++) {
                if (!t.keys.meets(block * kKeys, (block + 1) * kKeys)) continue;
                work.load_block(t.rows, block * kKeys, t.keys);
                work.step(t, false, nullptr, nullptr, sums);
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
};

template <class T, class Work>
struct Backward : Gradients<T> {
  using Gradients<T>::f, Gradients<T>::a, Gradients<T>::group, Gradients<T>::dim_step, Gradients<T>::value_step;
  using Gradients<T>::delta, Gradients<T>::offset;
  static constexpr int64_t kLeastRows = VectorWork<T>::kRows;  // of a tile, where there are more
  int64_t most, tiles, blocks;                                 // rows of a tile at most; tiles and blocks of a head

  explicit Backward(const AttentionBackwardArgs& args) : Gradients<T>(args) {
    blocks = (a.keys + kKeys - 1) / kKeys;
    set_tiles(Work::most_rows(a));
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

  void set_tiles(int64_t rows) {
    most = std::min(rows, round_up(std::max<int64_t>(a.queries * group, 1), kLanes));
    tiles = (a.queries * group + most - 1) / most;
  }

  void clear_dq(Work& work) const { std::fill_n(work.dq, most * dim_step, 0.0f); }

  void write_keys(int64_t batch, int64_t kv_head, int64_t first, int64_t count, const float* dk, const float* dv,
                  float factor) const {
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

  float* clear_keys(int64_t count) const {  // whole blocks of them
    const int64_t floats = count * (dim_step + value_step);
    auto* p = static_cast<float*>(cpu::scratch(floats * sizeof(float) + 64, 2));
    std::fill_n(p, floats, 0.0f);
    return p;
  }

  void heads_at_once() const {
    parallel_for(a.batch * a.kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t batch = i / a.kv_heads, kv_head = i % a.kv_heads;
        float *dk = clear_keys(blocks * kKeys), *dv = dk + blocks * kKeys * dim_step;
        Work work(*this, most);
        RowTile t;
        for (int64_t tile = 0; tile < tiles; tile++) {
          clear_dq(work);
          if (this->set_rows(t, batch, kv_head * group, group, tile * most, most)) {
            work.load_rows(t, true);
            for (int64_t k = t.keys.lo / kKeys * kKeys; k < t.keys.hi; k += kKeys) {
              work.load_block(t.rows, k, t.keys);
              work.step(t, f.dq, dk + k * dim_step, dv + k * value_step);
            }
          }
          if (f.dq) this->write_dq(t, work.dq);
        }
        write_keys(batch, kv_head, 0, a.keys, dk, dv, work.key_factor());
      }
    });
  }

  void gradients_of_keys() const {
    parallel_for(a.batch * a.kv_heads * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t head = i / blocks, first = i % blocks * kKeys, batch = head / a.kv_heads,
                      kv_head = head % a.kv_heads;
        float *dk = clear_keys(kKeys), *dv = dk + kKeys * dim_step;
        Work work(*this, most);
        RowTile t;
        bool loaded = false;
        for (int64_t tile = 0; tile < tiles; tile++) {
          if (!this->set_rows(t, batch, kv_head * group, group, tile * most, most) ||
              !t.keys.meets(first, first + kKeys))
            continue;
          if (!loaded) work.load_block(t.rows, first, {0, a.keys});
          loaded = true;
          work.load_rows(t, true);
          work.step(t, false, dk, dv);
        }
        write_keys(batch, kv_head, first, std::min(kKeys, a.keys - first), dk, dv, work.key_factor());
      }
    });
  }

  void gradients_of_queries() const {
    parallel_for(a.batch * a.kv_heads * tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t head = i / tiles, tile = tiles - 1 - i % tiles;  // the longest first
        Work work(*this, most);
        RowTile t;
        clear_dq(work);
        if (this->set_rows(t, head / a.kv_heads, head % a.kv_heads * group, group, tile * most, most)) {
          work.load_rows(t, false);
          for (int64_t k = t.keys.lo / kKeys * kKeys; k < t.keys.hi; k += kKeys) {
            work.load_block(t.rows, k, t.keys);
            work.step(t, true, nullptr, nullptr);
          }
        }
        this->write_dq(t, work.dq);
      }
    });
  }

  void run() {
    set_delta();
    const int64_t heads = a.batch * a.kv_heads, threads = cpu::num_threads();
    // Products a thread waits for: five for each of its heads, or its share of seven.
    if (f.dk && (heads + threads - 1) / threads * 5 * threads <= 7 * heads) {
      heads_at_once();
    } else {
      set_tiles(std::min(most, std::max(kLeastRows, round_up(heads * a.queries * group / (8 * threads), kLanes))));
      if (f.dk) gradients_of_keys();
      if (f.dq) gradients_of_queries();
    }
    if (f.dbias) BiasGradient<T>(*this).run();
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
  with_dtype(f.in.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
#if ISA_AVX512
    if constexpr (!std::is_same_v<T, f16>)
      if (TileWork<T>::takes(f.in)) return Backward<T, TileWork<T>>(f).run();
#endif
    Backward<T, VectorWork<T>>(f).run();
  });
}

}  // namespace pyllm::ISA

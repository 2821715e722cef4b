// The inner loop is a tile: kTile rows of A by one panel of kPanel columns of B, all of their sums in registers. A block
// of B's panel, [k][kPanel], is packed into the first-level cache and every tile of A goes past it, from a copy,
// [tile][k][kTile], that sits in the second. So each thread packs what it reads once, and a piece of C is as large as the
// threads allow. A tile leaves the processor no slack to wait for memory: between a few k and the next few it fetches
// some lines of what comes after, its own part of C and the block of B that is read next.
// For a few rows packing would cost more than the product: B is read in place, transposed in registers where its
// columns lie along memory, and memory's speed is the limit. Narrow panels are widened in registers, too: through the
// first-level cache, one row of bf16 took longer than torch's.
#include "cpu/kernels/gemm.h"

#include <array>
#include <utility>

#include "cpu/kernels/gemm_panels.h"
#include "cpu/kernels/gemm_pieces.h"

namespace pyllm::ISA {

void pack(const Matrix& b, int64_t n, int64_t k, float* out) {
  parallel_for((n + kPanel - 1) / kPanel, kGroup, [&](int64_t begin, int64_t end) {
    with_dtype(b.dtype, [&](auto* tag) {
      for (int64_t p = begin; p < end; p += kGroup)
        pack_panels<std::remove_pointer_t<decltype(tag)>>(b, n, p * kPanel, std::min(p + kGroup, end) * kPanel, 0, k,
                                                          out + p * kPanel * k, kPanel * k);
    });
  });
}

void pack_narrow(const Matrix& b, int64_t n, int64_t k, void* out) {
  const int64_t rows = narrow_rows(k);
  if (b.row_step == 1 && b.column_step % 2 == 0 && k % 2 == 0) {  // a pair is a word of memory, moved as a float is
    const Matrix pairs = {b.data, DType::f32, 1, b.column_step / 2};
    parallel_for((n + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++) {
        float* panel = static_cast<float*>(out) + p * rows / 2 * kPanel;
        pack_panels<float>(pairs, n, p * kPanel, (p + 1) * kPanel, 0, k / 2, panel, 0);
        std::fill(panel + k / 2 * kPanel, panel + rows / 2 * kPanel, 0.0f);
      }
    });
    return;
  }
  parallel_for((n + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    auto* wide = static_cast<float*>(cpu::scratch(kPanel * kBlockK * sizeof(float), 7));
    with_dtype(b.dtype, [&](auto* tag) {
      for (int64_t p = begin; p < end; p++)
        for (int64_t k0 = 0; k0 < rows; k0 += kBlockK) {
          const int64_t count = std::clamp<int64_t>(k - k0, 0, kBlockK), padded = std::min(kBlockK, rows - k0);
          pack_panels<std::remove_pointer_t<decltype(tag)>>(b, n, p * kPanel, (p + 1) * kPanel, k0, count, wide, 0);
          std::fill(wide + count * kPanel, wide + padded * kPanel, 0.0f);
          auto* to = static_cast<decltype(tag)>(out) + (p * rows + k0) * kPanel;
          for (int64_t i = 0; i < padded; i += 2)
            for (int64_t j = 0; j < kPanel; j += W, to += 2 * W)
              store_pairs(to, load(wide + i * kPanel + j), load(wide + (i + 1) * kPanel + j));
        }
    });
  });
}

namespace {

constexpr int64_t kFew = 16;  // k that a tile adds between two fetches

// Of a packed panel that only a few rows pass by, a line is asked for as another is read. Several rows ask early by the
// second-level cache, too, which has more requests under way than the first-level one; one row is late enough in any case.
template <int R>
VEC void ask_ahead(const void* p) {
  constexpr int64_t kAhead = 4096, kFarAhead = 16384;  // bytes
  __builtin_prefetch(static_cast<const char*>(p) + kAhead);
  if (R > 1) __builtin_prefetch(static_cast<const char*>(p) + kFarAhead, 0, 2);
}

// A's rows are copied tile by tile, a block of k at a time: [k][kTile]. The rows of a block are shared out evenly over its
// tiles.
constexpr int64_t kTileFloats = kTile * kBlockK + 2 * W;  // not a power of two: tiles are written side by side

struct Tiles {
  int64_t count, least, taller;  // the first `taller` tiles have one row more than `least`
  explicit Tiles(int64_t rows) : count((rows + kTile - 1) / kTile), least(rows / count), taller(rows % count) {}
  int64_t height(int64_t t) const { return least + (t < taller); }
};

template <class T>
void pack_rows(const Product& p, int64_t i0, const Tiles& tiles, int64_t k0, int64_t count, float* out) {
  const int64_t row_step = p.a.row_step, column_step = p.a.column_step;
  const T* source = static_cast<const T*>(p.a.data) + i0 * row_step + k0 * column_step;
  if (column_step == 1) {
    for (int64_t t = 0; t < tiles.count; t++, out += kTileFloats) {
      const int64_t height = tiles.height(t);
      for (int64_t k = 0; k < count; k += W) {
        const int64_t width = std::min<int64_t>(W, count - k);
        for (int64_t r = 0; r < kTile; r += W) {
          V rows[W];
          UNROLL for (int l = 0; l < W; l++) rows[l] =
              r + l < height ? get(source + (r + l) * row_step + k, width) : V{};
          for (int l = 0; l < W && r + l < kTile; l++)  // the next tile's
            __builtin_prefetch(source + (height + r + l) * row_step + k);
          transpose(rows);
          UNROLL for (int l = 0; l < W; l++) if (l < width)
              write(out + (k + l) * kTile + r, rows[l], std::min<int64_t>(W, kTile - r));
        }
      }
      source += height * row_step;
    }
    return;
  }
  // A few k of one tile after another: written a k at a time, the tiles would be more pages than the processor keeps.
  for (int64_t k = 0; k < count; k += kFew, source += kFew * column_step, out += kFew * kTile) {
    const int64_t few = std::min(kFew, count - k);
    const T* from = source;
    float* to = out;
    int64_t left = p.m - i0;
    for (int64_t t = 0; t < tiles.count; t++, to += kTileFloats) {
      const int64_t height = tiles.height(t);
      if (row_step == 1 && left >= round_up(kTile, W)) {  // the rows beyond `height` are not used
        for (int64_t l = 0; l < few; l++) {
          __builtin_prefetch(from + (l + kFew) * column_step);
          UNROLL for (int64_t r = 0; r < kTile; r += W) store(to + l * kTile + r, load(from + l * column_step + r));
        }
      } else {
        for (int64_t l = 0; l < few; l++)
          for (int64_t r = 0; r < height; r++) to[l * kTile + r] = to_float(from[l * column_step + r * row_step]);
      }
      from += height * row_step;
      left -= height;
    }
  }
}

// Memory that is read soon, fetched into the second-level cache: `rows` pieces of `width` bytes, `step` apart, in as many
// parts as `times` says. Where many lines are due at a time, every other one, for fewer wait: their neighbours come along.
class Ahead {
 public:
  Ahead(const void* corner, int64_t rows, int64_t step, int64_t width, int64_t times)
      : at_(static_cast<const char*>(corner)), end_(at_ + width), rows_(rows), step_(step), width_(width) {
    const auto parts = [&] { return (rows * ((width + line_ - 1) / line_) + times - 1) / std::max<int64_t>(times, 1); };
    if (parts() > 4) line_ *= 2;
    lines_ = parts();
  }
  VEC void fetch() {
    for (int64_t l = 0; l < lines_ && rows_ > 0; l++) {
      __builtin_prefetch(at_, 0, 2);
      at_ += line_;
      if (at_ >= end_) at_ = end_ - width_ + step_, end_ += step_, rows_--;
    }
  }

 private:
  const char *at_, *end_;
  int64_t rows_, step_, width_, lines_, line_ = 64;
};

// R rows of A by a panel, one block of k: c (+)= a b, then + bias. Sums must never be indexed by a loop that the compiler
// keeps: it would put all of them in memory. kStream: no other rows pass by the panel, which comes from memory.
template <int R, bool kStream>
void tile(const float* a, int64_t count, const float* b, float* c, int64_t c_step, int64_t columns, bool accumulate,
          const float* bias, Ahead& ahead) {
  V s[R][2] = {};
  Ahead own(c, R, c_step * sizeof(float), kPanel * sizeof(float), (count + kFew - 1) / kFew);
  for (; count > 0; count -= kFew) {
    ahead.fetch();
    own.fetch();
    for (const float* end = a + std::min(kFew, count) * kTile; a < end; a += kTile, b += kPanel) {
      const V v[2] = {load(b), load(b + W)};
      if (kStream) UNROLL for (int64_t j = 0; j < kPanel; j += 16) ask_ahead<R>(b + j);
      UNROLL for (int r = 0; r < R; r++) {
        const V x = set(a[r]);
        UNROLL for (int j = 0; j < 2; j++) s[r][j] = fma(x, v[j], s[r][j]);
      }
    }
  }
  if (columns >= kPanel) {
    UNROLL for (int r = 0; r < R; r++, c += c_step) UNROLL for (int j = 0; j < 2; j++) {
      V v = s[r][j];
      if (accumulate) v = load(c + j * W) + v;
      if (bias) v = v + load(bias + j * W);
      store(c + j * W, v);
    }
    return;
  }
  float edge[R][kPanel];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < 2; j++) store(edge[r] + j * W, s[r][j]);
  for (int r = 0; r < R; r++, c += c_step)
    for (int64_t j = 0; j < columns; j += W) {
      const int64_t n = std::min<int64_t>(W, columns - j);
      V v = load(edge[r] + j);
      if (accumulate) v = get(c + j, n) + v;
      if (bias) v = v + get(bias + j, n);
      write(c + j, v, n);
    }
}

using Tile = void (*)(const float*, int64_t, const float*, float*, int64_t, int64_t, bool, const float*, Ahead&);

template <bool kStream>
Tile tile_of(int64_t rows) {  // one panel wide
  const auto of = []<int... R>(std::integer_sequence<int, R...>) {
    return std::array<Tile, sizeof...(R)>{tile<R + 1, kStream>...};
  };
  static constexpr auto tiles = of(std::make_integer_sequence<int, kTile>());
  return tiles[rows - 1];
}

// Starts, finishes and stores W columns of C held in a register.
VEC V begin_c(const Product& p, int64_t i, int64_t j, int64_t n) {
  V v{};
  if (p.accumulate)
    with_dtype(p.c_dtype, [&](auto* tag) { v = get(static_cast<decltype(tag)>(p.c) + i * p.c_step + j, n); });
  return v;
}
VEC void end_c(const Product& p, int64_t i, int64_t j, int64_t n, V v) {
  if (p.bias) v = v + get(p.bias + j, n);
  with_dtype(p.c_dtype, [&](auto* tag) { write(static_cast<decltype(tag)>(p.c) + i * p.c_step + j, v, n); });
}

// R rows by columns j0..j1, where B's columns lie along memory: W x W blocks, transposed in registers, of 16-bit types by
// pairs. A few lines of each column are asked for ahead, one at a time between products (so many at once would wait for each
// other): so many columns are more than the processor foresees, and what a whole panel would take ahead is gone again
// before its turn, where the columns are long. A single row needs two blocks beside each other, as the chain of one sum
// would wait for itself; many have no registers for them.
template <int R, class T>
void few_rows_down(const Product& p, const float* a, int64_t i0, int64_t j0, int64_t j1) {
  constexpr int kBlocks = R <= 4 ? 2 : 1;
  constexpr int64_t kAhead = 192 / sizeof(T), kLine = 64 / sizeof(T);
  const int64_t step = p.b.column_step;
  for (int64_t j = j0; j < j1; j += kBlocks * W) {
    const T* corner = static_cast<const T*>(p.b.data) + j * step;
    const auto columns = [&](int g) { return std::clamp<int64_t>(j1 - j - g * W, 0, W); };
    const bool whole = columns(kBlocks - 1) == W;
    V total[R][kBlocks];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int g = 0; g < kBlocks; g++) total[r][g] =
        columns(g) ? begin_c(p, i0 + r, j + g * W, columns(g)) : V{};
    for (int64_t k0 = 0; k0 < p.k; k0 += kBlockK) {
      const int64_t end = std::min(k0 + kBlockK, p.k);
      V s[R][kBlocks] = {};
      const auto add = [&](int g, int64_t k, V row) {
        UNROLL for (int r = 0; r < R; r++) s[r][g] = fma(set(a[r * p.k + k]), row, s[r][g]);
      };
      int64_t k = k0;
      if constexpr (sizeof(T) == 2)
        for (; whole && k + 2 * W <= end; k += 2 * W) UNROLL for (int g = 0; g < kBlocks; g++) {
            const T* block = corner + k + g * W * step;
            VI pairs[W];
            load_pairs_transposed(block, step, pairs);
            UNROLL for (int l = 0; l < W; l++) {
              if (2 * W >= kLine || k % kLine == 0) __builtin_prefetch(block + l * step + kAhead);
              add(g, k + 2 * l, widen_low<T>(pairs[l]));
              add(g, k + 2 * l + 1, widen_high<T>(pairs[l]));
            }
          }
      for (; k < end; k += W) UNROLL for (int g = 0; g < kBlocks; g++) {
          const T* block = corner + k + g * W * step;
          const int64_t height = std::min<int64_t>(W, end - k);
          V rows[W];
          if (whole && height == W) {
            load_transposed(block, step, rows);
            UNROLL for (int l = 0; l < W; l++) {
              if (W >= kLine || k % kLine == 0) __builtin_prefetch(block + l * step + kAhead);
              add(g, k + l, rows[l]);
            }
          } else {
            load_transposed(block, step, height, columns(g), rows);
            for (int64_t l = 0; l < height; l++) add(g, k + l, rows[l]);
          }
        }
      UNROLL for (int r = 0; r < R; r++) UNROLL for (int g = 0; g < kBlocks; g++) total[r][g] =
          k0 || p.accumulate ? total[r][g] + s[r][g] : s[r][g];
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int g = 0; g < kBlocks; g++) if (columns(g))
        end_c(p, i0 + r, j + g * W, columns(g), total[r][g]);
  }
}

// R rows by columns j0..j1, where B's rows lie along memory: four of them at a time onto sums in the first-level cache.
template <int R, class T>
void few_rows_along(const Product& p, const float* a, int64_t i0, int64_t j0, int64_t j1) {
  constexpr int64_t kWide = 512;
  alignas(64) float total[R][kWide], s[R][kWide];
  for (int64_t j = j0; j < j1; j += kWide) {
    const int64_t columns = std::min(kWide, j1 - j);
    const auto each = [&](const auto& f) {
      int64_t c = 0;
      for (; c + W <= columns; c += W) f(c, W);
      if (c < columns) f(c, columns - c);
    };
    for (int r = 0; r < R; r++) each([&](int64_t c, int64_t n) { store(total[r] + c, begin_c(p, i0 + r, j + c, n)); });
    for (int64_t k0 = 0; k0 < p.k; k0 += kBlockK) {
      const int64_t end = std::min(k0 + kBlockK, p.k);
      const T* b = static_cast<const T*>(p.b.data) + k0 * p.b.row_step + j;
      int64_t k = k0;
      const auto rows = [&]<int kCount>() {
        for (; k + kCount <= end; k += kCount, b += kCount * p.b.row_step) {
          V x[R][kCount];
          for (int r = 0; r < R; r++)
            for (int l = 0; l < kCount; l++) x[r][l] = set(a[r * p.k + k + l]);
          const bool first = k == k0;
          each([&](int64_t c, int64_t n) {
            V v[R];
            UNROLL for (int r = 0; r < R; r++) v[r] = first ? V{} : load(s[r] + c);
            UNROLL for (int l = 0; l < kCount; l++) {
              const V w = get(b + l * p.b.row_step + c, n);
              UNROLL for (int r = 0; r < R; r++) v[r] = fma(x[r][l], w, v[r]);
            }
            UNROLL for (int r = 0; r < R; r++) store(s[r] + c, v[r]);
          });
        }
      };
      rows.template operator()<4>();
      rows.template operator()<1>();
      for (int r = 0; r < R; r++)
        each([&](int64_t c, int64_t) {
          store(total[r] + c, k0 || p.accumulate ? load(total[r] + c) + load(s[r] + c) : load(s[r] + c));
        });
    }
    for (int r = 0; r < R; r++) each([&](int64_t c, int64_t n) { end_c(p, i0 + r, j + c, n, load(total[r] + c)); });
  }
}

// R rows by kAcross of B's narrow panels from column j on, widened in registers: several, as the chain of one sum would wait
// for itself.
template <int R, int kAcross, class T>
void few_rows_narrow(const Product& p, const float* a, int64_t i0, int64_t j, int64_t j1) {
  constexpr int kVectors = 2 * kAcross;
  const int64_t step = narrow_rows(p.k) * kPanel;
  const T* panels = static_cast<const T*>(p.packed_narrow) + j / kPanel * step;
  const auto columns = [&](int v) { return std::clamp<int64_t>(j1 - j - v * W, 0, W); };
  V total[R][kVectors];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < kVectors; v++) total[r][v] =
      columns(v) ? begin_c(p, i0 + r, j + v * W, columns(v)) : V{};
  for (int64_t k0 = 0; k0 < p.k; k0 += kBlockK) {
    const int64_t end = std::min(k0 + kBlockK, p.k);
    V s[R][kVectors] = {};
    for (int64_t k = k0; k < end; k += 2) {
      const float* x = a + k;
      const bool both = k + 1 < end;
      UNROLL for (int v = 0; v < kVectors; v++) {
        const T* pairs = panels + v / 2 * step + k * kPanel + v % 2 * 2 * W;
        if (2 * W * sizeof(T) >= 64 || v % 2 == 0) ask_ahead<R>(pairs);
        const VI words = load_pairs(pairs);
        const V even = widen_low<T>(words), odd = widen_high<T>(words);
        UNROLL for (int r = 0; r < R; r++) s[r][v] = fma(set(x[r * p.k]), even, s[r][v]);
        if (both) UNROLL for (int r = 0; r < R; r++) s[r][v] = fma(set(x[r * p.k + 1]), odd, s[r][v]);
      }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < kVectors; v++) total[r][v] =
        k0 || p.accumulate ? total[r][v] + s[r][v] : s[r][v];
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < kVectors; v++) if (columns(v))
      end_c(p, i0 + r, j + v * W, columns(v), total[r][v]);
}
template <int R, class T>
void few_rows_narrow(const Product& p, const float* a, int64_t i0, int64_t j0, int64_t j1) {
  constexpr int kAcross = R == 1 ? 4 : R == 2 ? 2 : 1;
  if constexpr (!std::is_same_v<T, float>) {
    int64_t j = j0;
    for (; j + kAcross * kPanel <= j1; j += kAcross * kPanel) few_rows_narrow<R, kAcross, T>(p, a, i0, j, j1);
    for (; j < j1; j += kPanel) few_rows_narrow<R, 1, T>(p, a, i0, j, std::min(j + kPanel, j1));
  }
}

constexpr int64_t kFewRowsDown = 8, kFewRowsAlong = 4, kFewRowsNarrow = W == 16 ? 12 : 5;

void few_rows(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const int64_t rows = i1 - i0;
  auto* a = static_cast<float*>(cpu::scratch(rows * p.k * sizeof(float), 7));
  with_dtype(p.a.dtype, [&](auto* tag) {
    const auto* source = static_cast<decltype(tag)>(const_cast<void*>(p.a.data)) + i0 * p.a.row_step;
    for (int64_t r = 0; r < rows; r++, source += p.a.row_step) {
      int64_t k = 0;
      if (p.a.column_step == 1)
        for (; k + W <= p.k; k += W) store(a + r * p.k + k, load(source + k));
      for (; k < p.k; k++) a[r * p.k + k] = to_float(source[k * p.a.column_step]);
    }
  });
  with_dtype(p.b.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using Rows = void (*)(const Product&, const float*, int64_t, int64_t, int64_t);
    const auto of_rows = []<int... R>(const auto& of, std::integer_sequence<int, R...>) {
      return std::array<Rows, sizeof...(R)>{of.template operator()<R + 1>()...};
    };
    static constexpr auto down =
        of_rows([]<int R>() -> Rows { return few_rows_down<R, T>; }, std::make_integer_sequence<int, kFewRowsDown>());
    static constexpr auto along =
        of_rows([]<int R>() -> Rows { return few_rows_along<R, T>; }, std::make_integer_sequence<int, kFewRowsAlong>());
    static constexpr auto narrow = of_rows([]<int R>() -> Rows { return few_rows_narrow<R, T>; },
                                           std::make_integer_sequence<int, kFewRowsNarrow>());
    (p.packed_narrow ? narrow[rows - 1] : p.b.column_step == 1 ? along[rows - 1] : down[rows - 1])(p, a, i0, j0, j1);
  });
}

constexpr int64_t kRowFloats = 9 << 15;  // of A's copy: a share of the second-level cache

// Rows of A that go past one panel: packing B is the cheaper the more there are, adding to C the deeper their blocks.
int64_t max_rows(int64_t k) { return kRowFloats / std::clamp(k, kBlockK, 4 * kBlockK) / kTile * kTile; }

// What is read for rows k0..k0+count of B's columns j0..j1.
Ahead ahead_of(const Product& p, int64_t j0, int64_t j1, int64_t k0, int64_t count, int64_t times) {
  if (j0 >= j1) return {p.a.data, 0, 0, 0, times};
  if (p.packed) return {p.packed + j0 * p.k + k0 * kPanel, 1, 0, count * kPanel * 4, times};
  const int64_t size = size_of(p.b.dtype);
  if (p.packed_narrow) {
    const char* panel = static_cast<const char*>(p.packed_narrow) + (j0 * narrow_rows(p.k) + k0 * kPanel) * size;
    return {panel, 1, 0, count * kPanel * size, times};
  }
  const char* corner = static_cast<const char*>(p.b.data) + (k0 * p.b.row_step + j0 * p.b.column_step) * size;
  if (p.b.column_step == 1) return {corner, count, p.b.row_step * size, (j1 - j0) * size, times};
  if (p.b.row_step == 1) return {corner, j1 - j0, p.b.column_step * size, count * size, times};
  return {p.a.data, 0, 0, 0, times};
}

}  // namespace

void product_block(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  if (i0 >= i1 || j0 >= j1) return;
  if (on_tiles(p)) return tiles_block(p, i0, i1, j0, j1);
  const int64_t few = p.packed_narrow        ? kFewRowsNarrow
                      : p.b.column_step == 1 ? kFewRowsAlong
                      : p.b.row_step == 1    ? kFewRowsDown
                                             : 0;
  if (!p.packed && p.k > 0 && i1 - i0 <= few) return few_rows(p, i0, i1, j0, j1);
  const bool direct = p.c_dtype == DType::f32;
  const int64_t passes = (i1 - i0 - 1) / max_rows(p.k) + 1, height = round_up((i1 - i0 + passes - 1) / passes, kTile);
  const int64_t max_tiles = height / kTile, blocks = std::max<int64_t>((p.k + kBlockK - 1) / kBlockK, 1);
  const int64_t deep = std::clamp<int64_t>(kRowFloats / (height * kBlockK), 1, blocks);
  const int64_t copied = deep * max_tiles * kTileFloats + W;
  // Sums of a 16-bit C are kept wide until the last block of k.
  const int64_t width = direct           ? j1 - j0
                        : deep == blocks ? kGroup * kPanel
                                         : std::max(kRowFloats / height / kPanel * kPanel, kGroup * kPanel);
  const int64_t group = !p.packed && p.b.column_step == 1 ? kGroup : 1;
  const int64_t packed_here = p.packed ? 0 : group * kPanel * kBlockK;
  auto* copy =
      static_cast<float*>(cpu::scratch((copied + packed_here + (direct ? 0 : height * width)) * sizeof(float), 7));
  float *panels = copy + copied, *wide = panels + packed_here;
  for (int64_t i = i0; i < i1; i += height) {
    const int64_t rows = std::min(height, i1 - i);
    const Tiles tiles(rows);
    for (int64_t left = j0; left < j1; left += width) {
      const int64_t right = std::min(left + width, j1);
      float* c = direct ? static_cast<float*>(p.c) + i * p.c_step + left : wide;
      const int64_t c_step = direct ? p.c_step : width;
      const auto each_of_c = [&](const auto& f) {
        with_dtype(p.c_dtype, [&](auto* tag) {
          for (int64_t r = 0; r < rows; r++)
            for (int64_t j = left; j < right; j += W)
              f(static_cast<decltype(tag)>(p.c) + (i + r) * p.c_step + j, wide + r * width + j - left,
                std::min<int64_t>(W, right - j));
        });
      };
      if (!direct && p.accumulate) each_of_c([](auto* c, float* w, int64_t n) { write(w, get(c, n), n); });
      for (int64_t block0 = 0; block0 < blocks; block0 += deep) {
        const int64_t block1 = std::min(block0 + deep, blocks);
        if (deep < blocks || left == j0)
          with_dtype(p.a.dtype, [&](auto* tag) {
            for (int64_t block = block0; block < block1; block++)
              pack_rows<std::remove_pointer_t<decltype(tag)>>(p, i, tiles, block * kBlockK,
                                                              std::min(kBlockK, p.k - block * kBlockK),
                                                              copy + (block - block0) * tiles.count * kTileFloats);
          });
        for (int64_t first = left; first < right; first += group * kPanel)
          for (int64_t block = block0; block < block1; block++) {
            const int64_t k0 = block * kBlockK, count = std::min(kBlockK, p.k - k0);
            const int64_t end = std::min(first + group * kPanel, right);
            if (!p.packed)
              with_dtype(p.b.dtype, [&](auto* tag) {
                using T = std::remove_pointer_t<decltype(tag)>;
                const T* narrow = static_cast<const T*>(p.packed_narrow);
                if (!narrow) pack_panels<T>(p.b, p.n, first, end, k0, count, panels, kPanel * kBlockK);
                for (int64_t j = first; narrow && j < end; j += kPanel)
                  widen_pairs(narrow + j * narrow_rows(p.k) + k0 * kPanel, count, panels + (j - first) * kBlockK);
              });
            const bool last = block + 1 == block1, stream = p.packed && tiles.count == 1;  // which needs no help
            const int64_t next = last ? end : first, next_k = (last ? block0 : block + 1) * kBlockK;
            Ahead ahead = ahead_of(p, next, stream ? next : std::min(next + group * kPanel, right), next_k,
                                   std::min(kBlockK, p.k - next_k),
                                   (end - first + kPanel - 1) / kPanel * tiles.count * ((count + kFew - 1) / kFew));
            for (int64_t j = first; j < end; j += kPanel) {
              const float* b = p.packed ? p.packed + j * p.k + k0 * kPanel : panels + (j - first) * kBlockK;
              const float* bias = p.bias && block + 1 == blocks ? p.bias + j : nullptr;
              const float* a = copy + (block - block0) * tiles.count * kTileFloats;
              float* out = c + j - left;
              for (int64_t t = 0; t < tiles.count; t++) {
                const int64_t height = tiles.height(t);
                (stream ? tile_of<true> : tile_of<false>)(height)(a, count, b, out, c_step, std::min(kPanel, right - j),
                                                                  p.accumulate || block > 0, bias, ahead);
                a += kTileFloats;
                out += height * c_step;
              }
            }
          }
      }
      if (!direct) each_of_c([](auto* c, float* w, int64_t n) { write(c, get(w, n), n); });
    }
  }
}

void product(const Product& p) {
  const auto packed = [&](int64_t h, int64_t w) { return 12 * w * ((h + max_rows(p.k) - 1) / max_rows(p.k)) + 12 * h; };
  in_pieces(p, kTile, kPanel, packed, product_block);
}

}  // namespace pyllm::ISA

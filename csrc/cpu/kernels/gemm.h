// Matrix product C = A B (+ bias) for kernels: fp32 arithmetic on operands of any strides and float dtype.
//
// An element of C is the sum, in order, of blocks of kBlockK products, each block one chain of fused multiply-adds from
// zero. Nothing else about the call enters: a row has the same bits alone, in a batch, and for any number of threads.
//
// B is packed into panels of kPanel columns, [k][kPanel], so that the inner loop reads it front to back; a block of a
// panel stays in the cache while rows of A go past it, kTile at a time with all of their sums in registers.
#pragma once
#include <algorithm>

#include "cpu/kernels/vec.h"

namespace pyllm::ISA {
namespace {

constexpr int64_t kPanel = 2 * W;  // columns of a panel
constexpr int64_t kBlockK = 256;
#if ISA_AVX512
constexpr int64_t kTile = 12;  // rows of a tile: 24 of 32 registers are sums
#else
constexpr int64_t kTile = 6;  // 12 of 16
#endif

struct Matrix {  // element (i, j) is data[i * row_step + j * column_step]
  const void* data;
  DType dtype;
  int64_t row_step, column_step;
};

struct Product {
  int64_t m, n, k;
  Matrix a, b;          // m x k and k x n
  const float* packed;  // b from pack(), or null
  const float* bias;    // n, or null
  void* c;              // m x n, rows c_step apart
  DType c_dtype;
  int64_t c_step;
  bool accumulate;  // C starts from what is in c
};

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
[[maybe_unused]] int64_t packed_size(int64_t n, int64_t k) { return round_up(n, kPanel) * k; }  // floats

template <int kDistance>
VEC void transpose_stage(V* rows) {
  VI low, high;
  for (int l = 0; l < W; l++) {
    low[l] = l & kDistance ? l - kDistance + W : l;
    high[l] = l & kDistance ? l + W : l + kDistance;
  }
  for (int i = 0; i < W; i++) {
    if (i & kDistance) continue;
    const V a = rows[i], b = rows[i + kDistance];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + kDistance] = __builtin_shuffle(a, b, high);
  }
}

VEC void transpose(V* rows) {
  transpose_stage<1>(rows);
  transpose_stage<2>(rows);
#if ISA_AVX2 || ISA_AVX512
  transpose_stage<4>(rows);
#endif
#if ISA_AVX512
  transpose_stage<8>(rows);
#endif
}

// Rows k0..k0+count of one panel, columns from `column` on (those beyond n are zeros), to out[count][kPanel].
template <class T>
void pack_panel(const Matrix& b, int64_t n, int64_t column, int64_t k0, int64_t count, float* out) {
  const T* source = static_cast<const T*>(b.data) + k0 * b.row_step + column * b.column_step;
  const int64_t columns = std::min(kPanel, n - column);
  if (b.column_step == 1) {
    for (int64_t k = 0; k < count; k++, source += b.row_step, out += kPanel)
      for (int64_t j = 0; j < kPanel; j += W) {
        const int64_t left = columns - j;
        store(out + j, left >= W ? load(source + j) : left > 0 ? load_n(source + j, left) : V{});
      }
    return;
  }
  for (int64_t j = 0; j < kPanel; j += W) {
    const int64_t live = std::clamp<int64_t>(columns - j, 0, W);
    int64_t k = 0;
    if (b.row_step == 1 && live > 0) {
      for (; k < count; k += W) {
        const int64_t length = std::min<int64_t>(W, count - k);
        V rows[W];
        for (int64_t l = 0; l < W; l++) {
          const T* row = source + (j + l) * b.column_step + k;
          rows[l] = l < live ? get(row, length) : V{};
        }
        transpose(rows);
        for (int64_t l = 0; l < length; l++) store(out + (k + l) * kPanel + j, rows[l]);
      }
      continue;
    }
    for (; k < count; k++)
      for (int64_t l = 0; l < W; l++)
        out[k * kPanel + j + l] = l < live ? to_float(source[k * b.row_step + (j + l) * b.column_step]) : 0.0f;
  }
}

// All of b (k x n), panel after panel.
[[maybe_unused]] void pack(const Matrix& b, int64_t n, int64_t k, float* out) {
  parallel_for((n + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    with_dtype(b.dtype, [&](auto* tag) {
      for (int64_t p = begin; p < end; p++)
        pack_panel<std::remove_pointer_t<decltype(tag)>>(b, n, p * kPanel, 0, k, out + p * kPanel * k);
    });
  });
}

// R rows of A by P panels, one block of k: c (+)= a b, then + bias.
template <int R, int P>
void tile(const float* a, int64_t a_row, int64_t a_column, int64_t count, const float* b, int64_t panel_step, float* c,
          int64_t c_step, int64_t columns, bool accumulate, const float* bias) {
  V s[R][2 * P] = {};
  for (int64_t k = 0; k < count; k++, a += a_column, b += kPanel) {
    V v[2 * P];
    for (int p = 0; p < P; p++) {
      v[2 * p] = load(b + p * panel_step);
      v[2 * p + 1] = load(b + p * panel_step + W);
    }
    for (int r = 0; r < R; r++) {
      const V x = set(a[r * a_row]);
      for (int j = 0; j < 2 * P; j++) s[r][j] = fma(x, v[j], s[r][j]);
    }
  }
  for (int r = 0; r < R; r++, c += c_step)
    for (int j = 0; j < 2 * P; j++) {
      const int64_t n = std::min<int64_t>(W, columns - j * W);
      if (n <= 0) break;
      V v = s[r][j];
      if (accumulate) v = get(c + j * W, n) + v;
      if (bias) v = v + get(bias + j * W, n);
      write(c + j * W, v, n);
    }
}

using Tile = void (*)(const float*, int64_t, int64_t, int64_t, const float*, int64_t, float*, int64_t, int64_t, bool,
                      const float*);

Tile tile_of(int64_t rows) {  // one panel wide
  constexpr Tile tiles[] = {tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>,  tile<5, 1>,  tile<6, 1>,
#if ISA_AVX512
                            tile<7, 1>, tile<8, 1>, tile<9, 1>, tile<10, 1>, tile<11, 1>, tile<12, 1>
#endif
  };
  return tiles[rows - 1];
}

// Rows i0..i1 of C's columns j0..j1 (j0 a multiple of kPanel), on the calling thread.
void product_block(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const int64_t width = round_up(j1 - j0, kPanel), rows = i1 - i0;
  const bool direct = p.c_dtype == DType::f32;
  const bool copy_a = p.a.dtype != DType::f32 || p.a.column_step != 1;
  const int64_t pack_floats = p.packed ? 0 : width * kBlockK;
  auto* buffer = static_cast<float*>(
      cpu::scratch((pack_floats + (copy_a ? kTile * kBlockK : 0) + (direct ? 0 : rows * width)) * sizeof(float), 7));
  float* tile_a = buffer + pack_floats;
  float* wide_c = tile_a + (copy_a ? kTile * kBlockK : 0);
  float* c = direct ? static_cast<float*>(p.c) + i0 * p.c_step + j0 : wide_c;
  const int64_t c_step = direct ? p.c_step : width;
  if (!direct && p.accumulate)
    with_dtype(p.c_dtype, [&](auto* tag) {
      const auto* source = static_cast<decltype(tag)>(p.c) + i0 * p.c_step + j0;
      for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < j1 - j0; j += W) {
          const int64_t n = std::min<int64_t>(W, j1 - j0 - j);
          write(wide_c + i * width + j, get(source + i * p.c_step + j, n), n);
        }
    });
  int64_t k0 = 0;
  do {  // once even for k = 0, which is a sum of nothing
    const int64_t count = std::min(kBlockK, p.k - k0);
    const bool accumulate = p.accumulate || k0 > 0, last = k0 + count == p.k;
    const float* b = p.packed ? p.packed + j0 * p.k + k0 * kPanel : buffer;
    const int64_t panel_step = (p.packed ? p.k : count) * kPanel;
    if (!p.packed)
      with_dtype(p.b.dtype, [&](auto* tag) {
        for (int64_t j = j0; j < j1; j += kPanel)
          pack_panel<std::remove_pointer_t<decltype(tag)>>(p.b, p.n, j, k0, count, buffer + (j - j0) * count);
      });
    for (int64_t i = i0; i < i1; i += kTile) {
      const int64_t height = std::min(kTile, i1 - i);
      const float* a;
      int64_t a_row = p.a.row_step, a_column = 1;
      if (!copy_a) {
        a = static_cast<const float*>(p.a.data) + i * a_row + k0;
      } else {
        with_dtype(p.a.dtype, [&](auto* tag) {
          const auto* source = static_cast<decltype(tag)>(const_cast<void*>(p.a.data)) + i * p.a.row_step +
                               k0 * p.a.column_step;
          if (p.a.column_step == 1) {
            for (int64_t r = 0; r < height; r++)
              for (int64_t k = 0; k < count; k += W) {
                const int64_t n = std::min<int64_t>(W, count - k);
                write(tile_a + r * kBlockK + k, get(source + r * p.a.row_step + k, n), n);
              }
          } else {
            for (int64_t k = 0; k < count; k++)
              for (int64_t r = 0; r < height; r++)
                tile_a[k * kTile + r] = to_float(source[r * p.a.row_step + k * p.a.column_step]);
          }
        });
        a = tile_a;
        a_row = p.a.column_step == 1 ? kBlockK : 1;
        a_column = p.a.column_step == 1 ? 1 : kTile;
      }
      float* out = c + (i - i0) * c_step;
      int64_t j = j0;
      // One or two rows would wait for their own sums: more panels at once keep the multipliers busy.
      if (height <= 2) {
        constexpr int kWide = 3;
        for (; j + kWide * kPanel <= j1; j += kWide * kPanel)
          (height == 1 ? tile<1, kWide> : tile<2, kWide>)(a, a_row, a_column, count, b + (j - j0) / kPanel * panel_step,
                                                          panel_step, out + j - j0, c_step, kWide * kPanel, accumulate,
                                                          p.bias && last ? p.bias + j : nullptr);
      }
      const Tile run = tile_of(height);
      for (; j < j1; j += kPanel)
        run(a, a_row, a_column, count, b + (j - j0) / kPanel * panel_step, panel_step, out + j - j0, c_step,
            std::min(kPanel, j1 - j), accumulate, p.bias && last ? p.bias + j : nullptr);
    }
    k0 += count;
  } while (k0 < p.k);
  if (!direct)
    with_dtype(p.c_dtype, [&](auto* tag) {
      auto* target = static_cast<decltype(tag)>(p.c) + i0 * p.c_step + j0;
      for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < j1 - j0; j += W) {
          const int64_t n = std::min<int64_t>(W, j1 - j0 - j);
          write(target + i * p.c_step + j, get(wide_c + i * width + j, n), n);
        }
    });
}

// The whole product, in pieces small enough for the cache and many enough for the threads.
[[maybe_unused]] void product(const Product& p) {
  if (p.m == 0 || p.n == 0) return;
  int64_t height = std::min<int64_t>(20 * kTile, round_up(p.m, kTile)), width = std::min<int64_t>(256, round_up(p.n, kPanel));
  const auto pieces = [&] { return ((p.m + height - 1) / height) * ((p.n + width - 1) / width); };
  const int64_t threads = p.m * p.n * p.k < 1 << 15 ? 1 : cpu::num_threads();
  while (threads > 1 && pieces() < 3 * threads && (width > 3 * kPanel || height > 4 * kTile)) {
    if (width > 3 * kPanel && (width >= height || height <= 4 * kTile))
      width = round_up(width / 2, kPanel);
    else
      height = round_up(height / 2, kTile);
  }
  const int64_t across = (p.n + width - 1) / width;
  parallel_for(pieces(), threads > 1 ? 1 : pieces(), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; piece++) {
      const int64_t i = piece / across * height, j = piece % across * width;
      product_block(p, i, std::min(i + height, p.m), j, std::min(j + width, p.n));
    }
  });
}

}  // namespace
}  // namespace pyllm::ISA

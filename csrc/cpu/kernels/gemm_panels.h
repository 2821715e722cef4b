// Panels of B as a tile reads them, [k][kPanel], made from a matrix of any strides.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cpu/kernels/gemm.h"

namespace pyllm::ISA {
namespace {

constexpr int64_t kGroup = 4;  // panels packed together, where B's rows lie along memory: more of a row at a time

// A W x W block of a matrix whose columns lie along memory, `column_step` apart: rows[l] is its row l.
template <class T>
VEC void load_transposed(const T* p, int64_t column_step, V* rows) {
  UNROLL for (int l = 0; l < W; l++) rows[l] = load(p + l * column_step);
  transpose(rows);
}
template <class T>
VEC void load_transposed(const T* p, int64_t column_step, int64_t height, int64_t columns, V* rows) {
  UNROLL for (int l = 0; l < W; l++) rows[l] = l < columns ? get(p + l * column_step, height) : V{};
  transpose(rows);
}

// Pairs of 16-bit rows, element by element, and back.
template <class T>
VEC void store_pairs(T* p, V even, V odd) {
  T rows[2][W];
  store(rows[0], even);
  store(rows[1], odd);
  const VI pairs = __builtin_convertvector(load_bits(rows[0]), VI) | __builtin_convertvector(load_bits(rows[1]), VI)
                                                                         << 16;
  std::memcpy(static_cast<void*>(p), &pairs, sizeof pairs);
}
VEC void store_pairs(float*, V, V) {}  // with_dtype's third case, which has no narrow panels

template <class T>
VEC V widen_low(VI pairs) {
  if constexpr (std::is_same_v<T, bf16>) return as_float(pairs << 16);
  const VH h = __builtin_convertvector(pairs, VH);
  return load(reinterpret_cast<const T*>(&h));
}
template <class T>
VEC V widen_high(VI pairs) {
  if constexpr (std::is_same_v<T, bf16>) return as_float(pairs & static_cast<int32_t>(0xffff0000));
  return widen_low<T>(pairs >> 16);
}
template <class T>
VEC VI load_pairs(const T* p) {
  VI pairs;
  std::memcpy(&pairs, static_cast<const void*>(p), sizeof pairs);
  return pairs;
}
template <class T>
void widen_pairs(const T* p, int64_t count, float* out) {  // `count` rows of a narrow panel
  for (int64_t i = 0; i < count; i += 2, out += 2 * kPanel)
    for (int64_t j = 0; j < kPanel; j += W, p += 2 * W) {
      const VI pairs = load_pairs(p);
      store(out + j, widen_low<T>(pairs));
      if (i + 1 < count) store(out + kPanel + j, widen_high<T>(pairs));
    }
}
template <>
[[maybe_unused]] void widen_pairs(const float*, int64_t, float*) {}

// As load_transposed, of 2W rows of a 16-bit matrix: pairs of them, as half as many words are moved then.
template <class T>
VEC void load_pairs_transposed(const T* p, int64_t column_step, VI* pairs) {
  V words[W];
  load_transposed(static_cast<const void*>(p), column_step * static_cast<int64_t>(sizeof(T)), words);
  UNROLL for (int l = 0; l < W; l++) pairs[l] = as_int(words[l]);
}

// `count` rows of a panel of columns that do not lie side by side.
template <class T>
void pack_panel_down(const Matrix& b, const T* source, int64_t columns, int64_t count, float* out) {
  if (b.row_step == 1) {
    if constexpr (sizeof(T) == 2)
      for (; columns == kPanel && count >= 2 * W; count -= 2 * W, source += 2 * W, out += 2 * W * kPanel)
        for (int64_t j = 0; j < kPanel; j += W) {
          VI pairs[W];
          load_pairs_transposed(source + j * b.column_step, b.column_step, pairs);
          UNROLL for (int l = 0; l < W; l++) {
            store(out + 2 * l * kPanel + j, widen_low<T>(pairs[l]));
            store(out + (2 * l + 1) * kPanel + j, widen_high<T>(pairs[l]));
          }
        }
    for (int64_t k = 0; k < count; k += W, source += W, out += W * kPanel) {
      const int64_t height = std::min<int64_t>(W, count - k);
      for (int64_t j = 0; j < kPanel; j += W) {
        V rows[W];
        const T* corner = source + j * b.column_step;
        if (columns >= j + W && height == W) {
          load_transposed(corner, b.column_step, rows);
          UNROLL for (int l = 0; l < W; l++) store(out + l * kPanel + j, rows[l]);
        } else {
          load_transposed(corner, b.column_step, height, columns - j, rows);
          for (int64_t l = 0; l < height; l++) store(out + l * kPanel + j, rows[l]);
        }
      }
    }
    return;
  }
  for (int64_t k = 0; k < count; k++, source += b.row_step, out += kPanel)
    for (int64_t j = 0; j < kPanel; j++) out[j] = j < columns ? to_float(source[j * b.column_step]) : 0.0f;
}

// Rows k0..k0+count of the panels of columns column..end (those beyond n are zeros), each to [count][kPanel], panel_step
// apart.
template <class T>
void pack_panels(const Matrix& b, int64_t n, int64_t column, int64_t end, int64_t k0, int64_t count, float* out,
                 int64_t panel_step) {
  const T* source = static_cast<const T*>(b.data) + k0 * b.row_step + column * b.column_step;
  if (b.column_step == 1) {
    for (int64_t k = 0; k < count; k++, source += b.row_step, out += kPanel) {
      const T* from = source;
      float* to = out;
      for (int64_t left = n - column; left > n - end; left -= kPanel, from += kPanel, to += panel_step) {
        for (int64_t j = 0; j < kPanel; j += W)
          store(to + j, left - j >= W ? load(from + j) : left > j ? load_n(from + j, left - j) : V{});
      }
    }
    return;
  }
  for (; column < end; column += kPanel, source += kPanel * b.column_step, out += panel_step)
    pack_panel_down(b, source, std::min(kPanel, n - column), count, out);
}

}  // namespace
}  // namespace pyllm::ISA

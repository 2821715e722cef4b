// Rows of a packed weight, widened: what an embedding takes of it, and what the gradient of a product's input needs.
//
// The gradient of x is dy times the weight. Threads take groups of columns; for each, some rows of the weight at a time
// are widened (as many as stay in the first-level caches, whatever the weight's size), and tiles of dx, some of its rows
// by the group, take them in one after the other: a sum's order is that of the weight's rows, whatever the batch.
#include "cpu/kernels/gemm.h"
#include "cpu/quantized_linear.h"

namespace pyllm::ISA {
namespace {

constexpr int64_t kMost = 32;  // elements of a group

// Group g of a row to out, as its `dequantize` in Python rounds it.
void widen(const QuantizedWeight& w, const char* panels, int64_t row, int64_t g, float* out) {
  const int64_t j = row % kPanel, quads = w.value_bytes() / 4;
  const char* group = panels + (row / kPanel * w.groups + g) * w.group_bytes(kPanel);
  const char* scales = group + w.value_bytes() * kPanel;
  const auto scale_at = [&](int64_t at) {
    return w.scale_dtype == DType::f16 ? to_float(reinterpret_cast<const f16*>(scales)[at])
                                       : reinterpret_cast<const float*>(scales)[at];
  };
  uint8_t bytes[kMost];
  for (int64_t q = 0; q < quads; q++) std::memcpy(bytes + 4 * q, group + (q * kPanel + j) * 4, 4);
  if (w.bits == 4) {
    for (int64_t i = 0; i < kMost / 2; i++) {
      bytes[kMost / 2 + i] = bytes[i] >> 4;
      bytes[i] &= 15;
    }
  }
  const float scale = scale_at(j);
  const float minimum = w.has_minimums ? scale_at(kPanel + j) : 0.0f;
  const float zero = w.has_minimums ? 0.0f : static_cast<float>(1 << (w.bits - 1));
  for (int64_t i = 0; i < w.group; i++) out[i] = (static_cast<float>(bytes[i]) - zero) * scale + minimum;
}

constexpr int64_t kDepth = 256;  // rows of the weight at a time

// dx[r][0 .. kGroup) += dy[r][0 .. depth) * block (depth x kGroup), for R rows.
template <int R, int kGroup>
void add_tile(const float* dy, int64_t dy_row, const float* block, int64_t depth, float* dx, int64_t dx_row,
              int64_t live, bool first) {
  constexpr int kWide = kGroup / W;
  V s[R][kWide] = {};
  const auto columns = [&](int v) { return std::max<int64_t>(0, std::min<int64_t>(W, live - v * W)); };
  if (!first)
    for (int r = 0; r < R; r++)
      for (int v = 0; v < kWide; v++) s[r][v] = get(dx + r * dx_row + v * W, columns(v));
  for (int64_t i = 0; i < depth; i++, block += kGroup) {
    V b[kWide];
    UNROLL for (int v = 0; v < kWide; v++) b[v] = load(block + v * W);
    UNROLL for (int r = 0; r < R; r++) {
      const V a = set(dy[r * dy_row + i]);
      UNROLL for (int v = 0; v < kWide; v++) s[r][v] = fma(a, b[v], s[r][v]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < kWide; v++) write(dx + r * dx_row + v * W, s[r][v], columns(v));
}

template <int kGroup>
void run_backward(const QuantizedLinearBackwardArgs& p) {
  constexpr int kRows = std::max(1, 12 * W / kGroup);
  auto* dy = static_cast<float*>(cpu::scratch(p.m * kDepth * sizeof(float), 0));
  for (int64_t n0 = 0; n0 < p.weight.n; n0 += kDepth) {
    const int64_t depth = std::min(kDepth, p.weight.n - n0);
    with_dtype(p.dtype, [&](auto* tag) {
      const auto* from = reinterpret_cast<decltype(tag)>(const_cast<char*>(p.dy));
      for (int64_t i = 0; i < p.m; i++)
        for (int64_t j = 0; j < depth; j += W) {
          const int64_t live = std::min<int64_t>(W, depth - j);
          store_n(dy + i * kDepth + j, get(from + i * p.dy_row + n0 + j, live), live);
        }
    });
    parallel_for(p.weight.groups, 1, [&](int64_t begin, int64_t end) {
      auto* block = static_cast<float*>(cpu::scratch(kDepth * kGroup * sizeof(float), 1));
      for (int64_t g = begin; g < end; g++) {
        for (int64_t i = 0; i < depth; i++) widen(p.weight, p.panels, n0 + i, g, block + i * kGroup);
        const int64_t live = std::min<int64_t>(kGroup, p.k - g * kGroup);
        float* dx = p.dx + g * kGroup;
        int64_t i = 0;
        for (; i + kRows <= p.m; i += kRows)
          add_tile<kRows, kGroup>(dy + i * kDepth, kDepth, block, depth, dx + i * p.k, p.k, live, n0 == 0);
        for (; i < p.m; i++)
          add_tile<1, kGroup>(dy + i * kDepth, kDepth, block, depth, dx + i * p.k, p.k, live, n0 == 0);
      }
    });
  }
}

}  // namespace

void quantized_linear_backward(const QuantizedLinearBackwardArgs& p) {
  if (p.m == 0) return;
  if (p.weight.n == 0) {
    if (p.k) std::memset(static_cast<void*>(p.dx), 0, p.m * p.k * sizeof(float));
    return;
  }
  p.weight.group == 16 ? run_backward<16>(p) : run_backward<32>(p);
}

void quantized_embedding(const QuantizedEmbeddingArgs& p) {
  const int64_t group = p.weight.group;
  with_dtype(p.dtype, [&](auto* tag) {
    auto* out = reinterpret_cast<decltype(tag)>(p.out);
    parallel_for(p.count, 16384 / (p.k + 64) + 1, [&](int64_t begin, int64_t end) {
      alignas(64) float block[kMost];
      for (int64_t i = begin; i < end; i++) {
        const int64_t id = p.ids_dtype == DType::i64 ? reinterpret_cast<const int64_t*>(p.ids)[i]
                                                     : reinterpret_cast<const int32_t*>(p.ids)[i];
        for (int64_t g = 0; g < p.weight.groups; g++) {
          widen(p.weight, p.panels, id, g, block);
          const int64_t live = std::min(group, p.k - g * group);
          for (int64_t j = 0; j < live; j += W)
            write(out + i * p.k + g * group + j, load(block + j), std::min<int64_t>(W, live - j));
        }
      }
    });
  });
}

}  // namespace pyllm::ISA

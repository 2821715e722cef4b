#include "cpu/linear.h"

#include "cpu/kernels/gemm.h"

namespace pyllm::ISA {

void matmul(const MatmulArgs& a) {
  auto* buffer = static_cast<float*>(cpu::scratch(a.n * sizeof(float) + 64, 0));
  product({a.m, a.n, a.k, {a.a, a.a_dtype, a.a_row, a.a_column}, {a.b, a.b_dtype, a.b_row, a.b_column}, nullptr,
           a.bias ? as_floats(a.bias, a.bias_dtype, a.n, buffer) : nullptr, a.c, a.c_dtype, a.n, false});
}

// Threads take columns; a column is summed by blocks of 64 rows, then over the blocks, in order.
void column_sum(const ColumnSumArgs& a) {
  with_dtype(a.dtype, [&](auto* tag) {
    const auto* source = reinterpret_cast<decltype(tag)>(const_cast<char*>(a.a));
    parallel_for((a.n + W - 1) / W, std::max<int64_t>(1, 16384 / (a.m + 1)), [&](int64_t begin, int64_t end) {
      for (int64_t j = begin * W; j < end * W && j < a.n; j += W) {
        const int64_t n = std::min<int64_t>(W, a.n - j);
        V total{};
        for (int64_t i0 = 0; i0 < a.m; i0 += 64) {
          V s{};
          for (int64_t i = i0; i < std::min(i0 + 64, a.m); i++) s = s + get(source + i * a.a_row + j, n);
          total = total + s;
        }
        with_dtype(a.sums_dtype, [&](auto* out) { write(reinterpret_cast<decltype(out)>(a.sums) + j, total, n); });
      }
    });
  });
}

}  // namespace pyllm::ISA

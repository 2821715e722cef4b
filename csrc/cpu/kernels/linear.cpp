#include "cpu/linear.h"

#include "cpu/kernels/gemm_parts.h"

namespace pyllm::ISA {

void matmul(const MatmulArgs& a) {
  auto* buffer = static_cast<float*>(cpu::scratch(a.n * sizeof(float) + 64, 0));
  const bool wide = a.packed && a.b_dtype == DType::f32;
  const Product p = {a.m,
                     a.n,
                     a.k,
                     {a.a, a.a_dtype, a.a_row, a.a_column},
                     {a.b, a.b_dtype, a.b_row, a.b_column},
                     wide ? reinterpret_cast<const float*>(a.b) : nullptr,
                     a.bias ? as_floats(a.bias, a.bias_dtype, a.n, buffer) : nullptr,
                     a.c,
                     a.c_dtype,
                     a.n,
                     false,
                     a.packed && !wide ? a.b : nullptr};
  a.gradient ? gradient_product(p) : product(p);
}

void pack_weight(const PackWeightArgs& a) {
  const Matrix b = {a.b, a.dtype, a.b_row, a.b_column};
  if (a.dtype == DType::f32)
    pack(b, a.n, a.k, reinterpret_cast<float*>(a.panels));
  else
    pack_narrow(b, a.n, a.k, a.panels);
}

// Threads take strips of columns, whose rows lie too far apart for the processor to foresee. A column is summed by blocks
// of 64 rows, then over the blocks, in order.
void column_sum(const ColumnSumArgs& a) {
  constexpr int kVectors = W == 16 ? 4 : 8;
  constexpr int64_t kStrip = kVectors * W, kAhead = 16;
  with_dtype(a.dtype, [&](auto* tag) {
    const auto* source = reinterpret_cast<decltype(tag)>(const_cast<char*>(a.a));
    parallel_for((a.n + kStrip - 1) / kStrip, std::max<int64_t>(1, 8192 / (a.m + 1)), [&](int64_t begin, int64_t end) {
      for (int64_t j = begin * kStrip; j < end * kStrip && j < a.n; j += kStrip) {
        const auto sum = [&]<int kCount>(int64_t at, int64_t n) {  // n columns of the last vector
          V total[kCount] = {};
          for (int64_t i0 = 0; i0 < a.m; i0 += 64) {
            V s[kCount] = {};
            for (int64_t i = i0; i < std::min(i0 + 64, a.m); i++) {
              for (int v = 0; v < kCount; v += 64 / sizeof(*source) / W)
                __builtin_prefetch(source + (i + kAhead) * a.a_row + at + v * W);
              UNROLL for (int v = 0; v < kCount; v++) s[v] =
                  s[v] + get(source + i * a.a_row + at + v * W, kCount == 1 ? n : W);
            }
            UNROLL for (int v = 0; v < kCount; v++) total[v] = total[v] + s[v];
          }
          with_dtype(a.sums_dtype, [&](auto* out) {
            UNROLL for (int v = 0; v < kCount; v++)
                write(reinterpret_cast<decltype(out)>(a.sums) + at + v * W, total[v], kCount == 1 ? n : W);
          });
        };
        if (j + kStrip <= a.n)
          sum.template operator()<kVectors>(j, W);
        else
          for (int64_t at = j; at < a.n; at += W) sum.template operator()<1>(at, std::min<int64_t>(W, a.n - at));
      }
    });
  });
}

}  // namespace pyllm::ISA

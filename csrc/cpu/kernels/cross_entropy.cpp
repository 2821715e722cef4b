// Cross-entropy over rows of logits. Forward walks a row once, in chunks that are combined in order: exponentials are
// relative to the largest of a chunk's first few logits, and the chunk's largest of all is found on the way. Threads take
// chunks, so that one long row keeps all of them busy, and the bits depend on the row alone. Backward is one pass more:
// the softmax again from the saved maximum and sum, scaled, minus the target.
//
// Both passes do as much arithmetic as memory leaves time for, so that they must overlap: lines are asked for ahead (a walk
// for the largest and one for the sum, from the cache, took a third longer), and exponentials come from a table in a
// register. Fresh memory for the gradient takes as long to clear as both passes: ops/ asks for huge pages, and
// pyllm/ops/memory.py keeps the last block. Stores past the caches made no difference there, and took twice as long on
// fresh memory, which the system has just left in them.
//
// The linear form makes a block of rows of logits by a matrix product, turns it into losses and, in place, into the
// gradient of that block, and adds its share to the gradients of x, weight and bias; blocks come in order, each product
// in a fixed order of its own.
#include "cpu/cross_entropy.h"

#include <type_traits>

#include "cpu/amx.h"
#include "cpu/kernels/each.h"
#include "cpu/kernels/functions.h"
#include "cpu/kernels/gemm_parts.h"

namespace pyllm::ISA {
namespace {

constexpr int64_t kChunk = 4096;
constexpr float kLeast = -87;    // the exponential of less counts as 0
constexpr float kFarAbove = 40;  // exponentials of more are not summed

struct Part {     // of one chunk
  float largest;  // logit
  float sum;      // of exp(logit - largest)
  float spread;   // sum of logit - largest, where labels are smoothed
};

// Exponentials are taken relative to the largest of the first few logits, so that one walk finds the largest of all and the
// sum; where that one is too far above, a second walk follows.
template <class T>
Part part_of(const T* x, int64_t n, bool smooth) {
  constexpr int64_t kStep = 4 * W, kBytes = kStep * sizeof(T), kAhead = 4096;
  float largest, total;
  const auto walk = [&](float reference) {
    const V from = set(reference);
    V m0 = set(-kInfinity), m1 = m0, m2 = m0, m3 = m0, s0{}, s1{}, s2{}, s3{};
    const auto add = [&](V v, V& m, V& s) {
      V p, power;
      m = max(v, m);  // a NaN is passed over here, and is in the sum
      exp_in_parts(max(set(kLeast), v - from), p, power);
      s = fma(p, power, s);
    };
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      UNROLL for (int64_t line = 0; line < kBytes; line += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(x + i) + kAhead + line, 0, 2);
      V a, b, c, d;
      load_pair(x + i, a, b), load_pair(x + i + 2 * W, c, d);
      add(a, m0, s0), add(b, m1, s1), add(c, m2, s2), add(d, m3, s3);
    }
    for (; i + W <= n; i += W) add(load(x + i), m0, s0);
    if (i < n) add(load_n(x + i, n - i, -kInfinity), m1, s1);
    largest = max(max(max(m0, m1), max(m2, m3)));
    total = sum((s0 + s1) + (s2 + s3));
  };
  V first = set(-kInfinity);
  for (int64_t i = 0; i < std::min(n, kStep); i += W)
    first = max(n - i < W ? load_n(x + i, n - i, -kInfinity) : load(x + i), first);
  const float glance = max(first);
  walk(glance == -kInfinity ? 0.0f : glance);
  const V from = set(largest == -kInfinity ? 0.0f : largest);
  if (largest - glance <= kFarAbove)
    total *= exp_nonpositive(glance - from)[0];
  else
    walk(from[0]);

  int64_t i = 0;
  V d0{}, d1{};
  if (smooth) {
    for (; i + 2 * W <= n; i += 2 * W) {
      d0 = d0 + (load(x + i) - from);
      d1 = d1 + (load(x + i + W) - from);
    }
    for (; i < n; i += W) d0 = d0 + keep(get(x + i, std::min<int64_t>(W, n - i)) - from, n - i, 0);
  }
  return {largest, total, sum(d0 + d1)};
}

Part combined(const Part* parts, int64_t classes) {
  Part all{-kInfinity, 0, 0};
  const int64_t chunks = (classes + kChunk - 1) / kChunk;
  if (chunks == 1) return parts[0];
  for (int64_t c = 0; c < chunks; c++) all.largest = parts[c].largest > all.largest ? parts[c].largest : all.largest;
  for (int64_t c = 0; c < chunks; c++) {
    const bool empty = parts[c].largest == -kInfinity;
    all.sum += parts[c].sum * (empty ? 1.0f : exp_nonpositive(set(parts[c].largest - all.largest))[0]);
    const auto n = static_cast<float>(std::min(kChunk, classes - c * kChunk));
    all.spread += parts[c].spread + (empty ? 0.0f : n * (parts[c].largest - all.largest));
  }
  return all;
}

float loss_of(const Part& row, float right, int64_t classes, float smoothing) {
  const float loss = (1 - smoothing) * (row.largest - right) + log(set(row.sum))[0];
  return smoothing > 0 ? loss - smoothing * (row.spread / classes) : loss;
}

// Columns [begin, end) of a row of dlogits, which may be the logits themselves.
template <class T>
void gradient(const T* x, T* out, int64_t begin, int64_t end, int64_t classes, int64_t target, float largest, float sum,
              float scale, float smoothing) {
  constexpr Digits kDigits = std::is_same_v<T, bf16> ? Digits::rough : Digits::all;
  const V from = set(largest), factor = set(scale / sum), level = set(scale * smoothing / classes);
  const bool has_target = target >= begin && target < end;
  const V at_target = has_target ? set(to_float(x[target])) : V{};  // out may be x
  each<1, 1, T>(end - begin, {x + begin}, {out + begin}, [&](const V(&v)[1], V(&d)[1]) {
    V p, power;
    const V y = v[0] - from;
    exp_in_parts<kDigits>(y, p, power);
    d[0] = fma(y < kLeast ? V{} : p * power, factor, -level);
  });
  if (has_target) put(out + target, (exp_nonpositive(at_target - from) * factor - level)[0] - scale * (1 - smoothing));
}

// What the losses are divided by.
float divisor(const Loss& loss, int64_t rows) {
  if (loss.reduction != Reduction::mean) return 1;
  int64_t kept = 0;
  for (int64_t row = 0; row < rows; row++) kept += !loss.ignores(row);
  return static_cast<float>(kept);
}

float total_of(const float* losses, int64_t rows, float count) {
  double total = 0;
  for (int64_t row = 0; row < rows; row++) total += losses[row];
  return static_cast<float>(total / count);
}

int64_t chunks_of(int64_t classes) { return (classes + kChunk - 1) / kChunk; }

int64_t grain_for(int64_t classes) { return std::max<int64_t>(1, 4 * kChunk / (std::min(kChunk, classes) + 64)); }

// Rows of logits that stand in a.block: their losses, and in their place the gradients.
void finish_block(const LinearCrossEntropyArgs& a, int64_t r0, int64_t rows, const Part* parts, const float* right,
                  float* losses, float count, bool gradients) {
  const int64_t chunks = chunks_of(a.classes);
  parallel_for(rows, gradients ? 1 : rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = r0 + i;
      float* logits = a.block + i * a.classes;
      if (a.loss.ignores(row)) {
        losses[row] = 0;
        if (gradients) std::memset(logits, 0, a.classes * sizeof(float));
        continue;
      }
      const Part all = combined(parts + i * chunks, a.classes);
      losses[row] = loss_of(all, right[i], a.classes, a.loss.smoothing);
      if (!gradients) continue;
      const float dloss = a.dloss ? a.dloss[a.loss.reduction == Reduction::none ? row : 0] : 1.0f;
      gradient(logits, logits, 0, a.classes, a.classes, a.loss.targets[row], all.largest, all.sum, dloss / count,
               a.loss.smoothing);
    }
  });
}

}  // namespace

void cross_entropy_forward(const CrossEntropyArgs& a) {
  const int64_t rows = a.rows.count, chunks = chunks_of(a.classes);
  auto* parts = static_cast<Part*>(cpu::scratch(rows * chunks * sizeof(Part), 0));
  auto* losses = a.losses ? a.losses : static_cast<float*>(cpu::scratch(rows * sizeof(float), 1));
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* logits = reinterpret_cast<const T*>(a.logits);
    parallel_for(rows * chunks, grain_for(a.classes), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t row = i / chunks, column = i % chunks * kChunk;
        if (a.loss.ignores(row)) continue;
        const int64_t n = std::min(kChunk, a.classes - column);
        parts[i] = part_of(logits + a.rows.offset(row) + column, n, a.loss.smoothing > 0);
      }
    });
    for (int64_t row = 0; row < rows; row++) {
      losses[row] = 0;
      if (a.loss.ignores(row)) continue;
      const Part all = combined(parts + row * chunks, a.classes);
      const float right = to_float(logits[a.rows.offset(row) + a.loss.targets[row]]);
      losses[row] = loss_of(all, right, a.classes, a.loss.smoothing);
      if (!a.statistics) continue;
      a.statistics[2 * row] = all.largest;
      a.statistics[2 * row + 1] = all.sum;
    }
  });
  if (a.loss.reduction != Reduction::none) *a.total = total_of(losses, rows, divisor(a.loss, rows));
}

void cross_entropy_backward(const CrossEntropyBackwardArgs& a) {
  const int64_t rows = a.rows.count, chunks = chunks_of(a.classes);
  const float count = divisor(a.loss, rows);
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* logits = reinterpret_cast<const T*>(a.logits);
    parallel_for(rows * chunks, grain_for(a.classes), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t row = i / chunks, first = i % chunks * kChunk, last = std::min(first + kChunk, a.classes);
        T* out = reinterpret_cast<T*>(a.dlogits) + row * a.classes;
        if (a.loss.ignores(row)) {
          std::memset(static_cast<void*>(out + first), 0, (last - first) * sizeof(T));
          continue;
        }
        const float scale = a.dloss[a.loss.reduction == Reduction::none ? row : 0] / count;
        gradient(logits + a.rows.offset(row), out, first, last, a.classes, a.loss.targets[row], a.statistics[2 * row],
                 a.statistics[2 * row + 1], scale, a.loss.smoothing);
      }
    });
  });
}

void linear_cross_entropy(const LinearCrossEntropyArgs& a) {
  const int64_t chunks = chunks_of(a.classes), element = size_of(a.dtype);
  auto* parts = static_cast<Part*>(cpu::scratch(a.block_rows * chunks * sizeof(Part), 0));
  auto* losses = a.losses ? a.losses : static_cast<float*>(cpu::scratch(a.rows * sizeof(float), 1));
  auto* right = static_cast<float*>(cpu::scratch(a.block_rows * sizeof(float), 2));
  auto* buffer = static_cast<float*>(cpu::scratch(a.classes * sizeof(float) + 64, 3));
  const float* bias = a.bias ? as_floats(a.bias, a.dtype, a.classes, buffer) : nullptr;
  const float count = divisor(a.loss, a.rows);
  const bool gradients = a.dx || a.dweight || a.dbias;
  if (a.rows == 0 && a.dweight) std::memset(a.dweight, 0, a.classes * a.width * size_of(a.dweight_dtype));
  if (a.rows == 0 && a.dbias) std::memset(a.dbias, 0, a.classes * sizeof(float));
  for (int64_t r0 = 0; r0 < a.rows; r0 += a.block_rows) {
    const int64_t rows = std::min(a.block_rows, a.rows - r0);
    const Matrix x{a.x + r0 * a.x_row * element, a.dtype, a.x_row, a.x_column};
    for (int64_t c0 = 0; c0 < a.classes; c0 += a.block_columns) {
      const int64_t columns = std::min(a.block_columns, a.classes - c0), across = chunks_of(columns);
      const Matrix transposed{a.weight + c0 * a.weight_row * element, a.dtype, a.weight_column, a.weight_row};
      product_in_parts({rows, columns, a.width, x, transposed, nullptr, bias ? bias + c0 : nullptr, a.block, DType::f32,
                        a.block_columns, false});
      parallel_for(rows * across, grain_for(columns), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          const int64_t row = i / across, column = i % across * kChunk, n = std::min(kChunk, columns - column);
          if (a.loss.ignores(r0 + row)) continue;
          const float* logits = a.block + row * a.block_columns + column;
          parts[row * chunks + (c0 + column) / kChunk] = part_of(logits, n, a.loss.smoothing > 0);
          const int64_t target = a.loss.targets[r0 + row] - c0 - column;
          if (target >= 0 && target < n) right[row] = logits[target];
        }
      });
    }
    finish_block(a, r0, rows, parts, right, losses, count, gradients);
    const bool more = r0 > 0;
    if (a.dbias)
      parallel_for((a.classes + W - 1) / W, std::max<int64_t>(1, 16384 / (rows + 1)), [&](int64_t begin, int64_t end) {
        for (int64_t j = begin * W; j < std::min(end * W, a.classes); j += W) {
          const int64_t n = std::min<int64_t>(W, a.classes - j);
          V s = more ? get(a.dbias + j, n) : V{};
          for (int64_t row = 0; row < rows; row++) s = s + get(a.block + row * a.classes + j, n);
          write(a.dbias + j, s, n);
        }
      });
    // Tile registers take bf16 by bf16 alone: the block's rows are rounded to it, each in its place. For a few rows they
    // do not pay.
    constexpr int64_t kFew = 4;
    const bool narrow = (a.dx || a.dweight) && a.dtype == DType::bf16 && cpu::has_amx() && rows >= kFew;
    if (narrow)
      parallel_for(rows, grain_for(a.classes), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
          const float* from = a.block + row * a.classes;
          auto* to = reinterpret_cast<bf16*>(a.block + row * a.classes);
          for (int64_t j = 0; j < a.classes; j += W) {
            const int64_t n = std::min<int64_t>(W, a.classes - j);
            write(to + j, get(from + j, n), n);
          }
        }
      });
    const DType dtype = narrow ? DType::bf16 : DType::f32;
    const int64_t step = narrow ? 2 * a.classes : a.classes;
    const Matrix dlogits{a.block, dtype, step, 1}, columns{a.block, dtype, 1, step};
    if (a.dx)
      gradient_product({rows,
                        a.width,
                        a.classes,
                        dlogits,
                        {a.weight, a.dtype, a.weight_row, a.weight_column},
                        nullptr,
                        nullptr,
                        a.dx + r0 * a.width * element,
                        a.dtype,
                        a.width,
                        false});
    if (a.dweight)
      gradient_product(
          {a.classes, a.width, rows, columns, x, nullptr, nullptr, a.dweight, a.dweight_dtype, a.width, more});
  }
  if (a.loss.reduction != Reduction::none) *a.total = total_of(losses, a.rows, count);
}

}  // namespace pyllm::ISA

// Cross-entropy over rows of logits. Forward reads memory once: a block takes a row, a thread keeps the largest logit so
// far and the sum of exponentials below it (an online softmax), and the threads' are combined in order. Backward is one
// pass more: the softmax again from what forward kept, scaled, minus the target. A target that is no class is reported,
// and its row's loss and gradient are NaN.
#include "cuda/cross_entropy.h"

#include "cuda/numbers.h"

namespace pyllm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 8192;  // columns that a block of backward takes

__device__ __forceinline__ float exp_below(float x) { return exp2f(x * 1.44269504088896341f); }
__device__ __forceinline__ float finite_or_zero(float largest) { return largest == -INFINITY ? 0.0f : largest; }
__device__ __forceinline__ int64_t target_of(const Loss& loss, int64_t row) {
  return integer_at(loss.targets.data, loss.targets.dtype, row);
}

struct Part {           // of the logits that a thread has seen
  float largest, sum;   // of exp(logit - largest)
  float spread, count;  // the sum of logit - largest, where labels are smoothed
};

template <class T>
__global__ void __launch_bounds__(kThreads) forward(CrossEntropyArgs a, float* losses, FaultRecord* record) {
  __shared__ float room[kWarp];
  constexpr int kSize = Pack<T>::kSize;
  const int64_t row = blockIdx.x, target = target_of(a.loss, row);
  if (target == a.loss.targets.ignored) {
    if (threadIdx.x == 0) losses[row] = 0;
    return;
  }
  const T* x = reinterpret_cast<const T*>(a.logits) + a.rows.offset(row);
  const bool whole = reinterpret_cast<uintptr_t>(x) % 16 == 0, smooth = a.loss.smoothing > 0;
  Part p{-INFINITY, 0, 0, 0};
  for (int64_t i = threadIdx.x * kSize; i < a.classes; i += kThreads * kSize) {
    const Pack<T> v = load_pack(x + i, a.classes - i, whole);
    const auto n = static_cast<int>(a.classes - i < kSize ? a.classes - i : kSize);
    float largest = p.largest;
#pragma unroll
    for (int k = 0; k < kSize; k++)
      if (k < n) largest = fmaxf(largest, v.x[k]);  // a NaN is passed over here, and found by the sum
    const float from = finite_or_zero(largest);
    if (p.count > 0 && largest != p.largest) {
      p.sum *= exp_below(p.largest - from);
      p.spread += p.count * (p.largest - from);
    }
#pragma unroll
    for (int k = 0; k < kSize; k++) {
      if (k >= n) continue;
      p.sum += exp_below(v.x[k] - from);
      if (smooth) p.spread += v.x[k] - from;
    }
    p.largest = largest;
    p.count += static_cast<float>(n);
  }
  const float largest = row_max(p.largest, room), from = finite_or_zero(largest);
  const float mine = finite_or_zero(p.largest);
  const float sum =
      row_sum(p.count > 0 ? p.sum * (p.largest == -INFINITY ? 1.0f : exp_below(mine - from)) : 0.0f, room);
  const float spread = smooth ? row_sum(p.count > 0 ? p.spread + p.count * (mine - from) : 0.0f, room) : 0.0f;
  if (threadIdx.x != 0) return;
  const bool good = target >= 0 && target < a.classes;
  if (!good) report(record, Fault::target, row, target, a.classes);
  const float right = good ? to_float(x[target]) : NAN;
  float loss = (1 - a.loss.smoothing) * (largest - right) + logf(sum);
  if (smooth) loss -= a.loss.smoothing * (spread / a.classes);
  losses[row] = loss;
  if (!a.statistics) return;
  a.statistics[2 * row] = largest;
  a.statistics[2 * row + 1] = sum;
}

// One block: the rows that are not ignored, and, of losses, the total divided by that, or by 1.
__global__ void __launch_bounds__(1024)
    add_rows(Loss loss, int64_t rows, const float* losses, float* total, float* count) {
  __shared__ double room[kWarp];
  double sum = 0, kept = 0;
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
    kept += target_of(loss, row) != loss.targets.ignored;
    if (losses) sum += losses[row];
  }
  sum = row_sum(sum, room);
  kept = loss.reduction == Reduction::mean ? row_sum(kept, room) : 1;
  if (threadIdx.x != 0) return;
  if (total) *total = static_cast<float>(sum / kept);
  if (count) *count = static_cast<float>(kept);
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward(CrossEntropyBackwardArgs a, const float* count) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t chunks = divided_up(a.classes, kChunk), row = blockIdx.x / chunks;
  const int64_t first = blockIdx.x % chunks * kChunk, last = first + kChunk < a.classes ? first + kChunk : a.classes;
  const int64_t target = target_of(a.loss, row);
  const T* x = reinterpret_cast<const T*>(a.logits) + a.rows.offset(row);
  T* out = reinterpret_cast<T*>(a.dlogits) + row * a.classes;
  const bool whole_x = reinterpret_cast<uintptr_t>(x) % 16 == 0, whole = reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const bool ignored = target == a.loss.targets.ignored, good = target >= 0 && target < a.classes;
  const float scale = good ? a.dloss[a.loss.reduction == Reduction::none ? row : 0] / *count : NAN;
  const float largest = ignored ? 0 : a.statistics[2 * row], sum = ignored ? 1 : a.statistics[2 * row + 1];
  const float factor = scale / sum, level = scale * a.loss.smoothing / a.classes;
  for (int64_t i = first + threadIdx.x * kSize; i < last; i += kThreads * kSize) {
    Pack<T> v{};
    if (!ignored) {
      v = load_pack(x + i, last - i, whole_x);
#pragma unroll
      for (int k = 0; k < kSize; k++) {
        v.x[k] = exp_below(v.x[k] - largest) * factor - level;
        if (i + k == target) v.x[k] -= scale * (1 - a.loss.smoothing);
      }
    }
    store_pack(out + i, v, last - i, whole);
  }
}

}  // namespace

void cross_entropy_forward(const CrossEntropyArgs& a, const Work& work) {
  const bool reduced = a.loss.reduction != Reduction::none;
  const Scratch own(work, a.losses ? 0 : a.rows.count * sizeof(float));
  float* losses = a.losses ? a.losses : own.as<float>();
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    launch(forward<T>, {a.rows.count}, dim3(kThreads), 0, work, a, losses, fault_record(work.device));
  });
  if (reduced)
    launch(add_rows, {1}, dim3(1024), 0, work, a.loss, a.rows.count, losses, a.total, static_cast<float*>(nullptr));
}

void cross_entropy_backward(const CrossEntropyBackwardArgs& a, const Work& work) {
  const Scratch count(work, sizeof(float));
  launch(add_rows, {1}, dim3(1024), 0, work, a.loss, a.rows.count, static_cast<float*>(nullptr),
         static_cast<float*>(nullptr), count.as<float>());
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    launch(backward<T>, {a.rows.count * divided_up(a.classes, kChunk)}, dim3(kThreads), 0, work, a, count.as<float>());
  });
}

}  // namespace pyllm::cuda

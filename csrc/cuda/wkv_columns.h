// What the forward and backward passes of RWKV-7's recurrence share on CUDA devices: the factors of some steps, and the
// steps of a head's state, which are written in csrc/cpu/kernels/wkv.h:
//     s = S' a    S = diag(exp(w)) S + b s + k v    y = S' r
//
// A block takes a head of a sequence, and keeps its state (keys x values, up to kDim of each, zeros beyond) in registers.
// Columns (values) do not depend on each other: four lanes share one, each with every fourth group of four keys, so that
// s and y are two shuffles, and no barrier. The factors of a chunk of steps are in shared memory; those of the next are on
// their way into registers meanwhile.
#pragma once
#include <type_traits>

#include "args/wkv.h"
#include "cuda/numbers.h"

namespace pyllm::cuda {

enum Factor { kDecay, kA, kB, kK, kR, kV, kDy };

__device__ __forceinline__ int64_t length_of(const WkvShape& s, int64_t batch, FaultRecord* record) {
  if (!s.lengths) return s.time;
  const int64_t n = s.lengths[batch];
  if (n >= 0 && n <= s.time) return n;
  report(record, Fault::wkv_length, batch, n, s.time);
  return n < 0 ? 0 : s.time;
}

// kInputs factors of kWkvChunk steps of a head, to rows of kDim in shared memory, kRows of them a step.
template <class T, int kDim, int kInputs, int kRows>
class Factors {
  static constexpr int kSteps = kWkvChunk / 4;  // of a thread

 public:
  __device__ Factors(const WkvShape& s, const WkvInput& dy, int64_t batch, int64_t head, float* rows)
      : s_(s), dy_(dy), batch_(batch), head_(head), rows_(rows) {}

  __device__ void fetch(int64_t first, int64_t count) {
    const WkvInput* const inputs[] = {&s_.w, &s_.a, &s_.b, &s_.k, &s_.r, &s_.v, &dy_};
    const int i = threadIdx.x % kDim;
#pragma unroll
    for (int f = 0; f < kInputs; f++) {
      const WkvInput& x = *inputs[f];
      const T* from = reinterpret_cast<const T*>(x.data) + batch_ * x.batch + first * x.time + head_ * x.head + i;
#pragma unroll
      for (int m = 0; m < kSteps; m++) {
        const int64_t t = m * 4 + threadIdx.x / kDim;
        next_[m][f] = i < s_.dim && t < count ? to_float(from[t * x.time]) : 0.0f;
      }
    }
  }

  // Between two barriers: what was there has been read, and what is there now is seen.
  __device__ void put() const {
#pragma unroll
    for (int m = 0; m < kSteps; m++) {
      float* row = rows_ + (m * 4 + threadIdx.x / kDim) * kRows * kDim + threadIdx.x % kDim;
#pragma unroll
      for (int f = 0; f < kInputs; f++) row[f * kDim] = f == kDecay ? expf(next_[m][f]) : next_[m][f];
    }
  }

 private:
  const WkvShape& s_;
  const WkvInput& dy_;
  const int64_t batch_, head_;
  float* const rows_;
  float next_[kSteps][kInputs];
};

template <int kDim>
struct Columns {
  static constexpr int kKeys = kDim / 4;  // of a thread
  const int part = threadIdx.x % kWarp / 8, column = threadIdx.x / kWarp * 8 + threadIdx.x % 8;
  float state[kKeys];

  // Groups of four follow each other.
  __device__ int key(int i) const { return i / 4 * 16 + part * 4 + i % 4; }

  __device__ void load(const float* from, int64_t dim) {  // (dim, dim), or null: zeros
#pragma unroll
    for (int i = 0; i < kKeys; i++)
      state[i] = from && key(i) < dim && column < dim ? from[key(i) * dim + column] : 0.0f;
  }
  __device__ void store(float* to, int64_t dim) const {
#pragma unroll
    for (int i = 0; i < kKeys; i++)
      if (key(i) < dim && column < dim) to[key(i) * dim + column] = state[i];
  }

  // One step, of factors f; returns y, and sets s. All lanes of a warp.
  __device__ float step(const float* f, float& s) {
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < kKeys; i += 4) {
      const float4 a = *reinterpret_cast<const float4*>(f + kA * kDim + key(i));
      sums[0] = fmaf(a.x, state[i], sums[0]);
      sums[1] = fmaf(a.y, state[i + 1], sums[1]);
      sums[2] = fmaf(a.z, state[i + 2], sums[2]);
      sums[3] = fmaf(a.w, state[i + 3], sums[3]);
    }
    s = over_parts(sums);
    const float v = f[kV * kDim + column];
    float outputs[4] = {};
#pragma unroll
    for (int i = 0; i < kKeys; i += 4) {
      const auto four = [&](Factor row) { return *reinterpret_cast<const float4*>(f + row * kDim + key(i)); };
      const float4 decay = four(kDecay), b = four(kB), k = four(kK), r = four(kR);
      state[i] = fmaf(k.x, v, fmaf(b.x, s, state[i] * decay.x));
      state[i + 1] = fmaf(k.y, v, fmaf(b.y, s, state[i + 1] * decay.y));
      state[i + 2] = fmaf(k.z, v, fmaf(b.z, s, state[i + 2] * decay.z));
      state[i + 3] = fmaf(k.w, v, fmaf(b.w, s, state[i + 3] * decay.w));
      outputs[0] = fmaf(r.x, state[i], outputs[0]);
      outputs[1] = fmaf(r.y, state[i + 1], outputs[1]);
      outputs[2] = fmaf(r.z, state[i + 2], outputs[2]);
      outputs[3] = fmaf(r.w, state[i + 3], outputs[3]);
    }
    return over_parts(outputs);
  }

 private:
  __device__ static float over_parts(const float (&x)[4]) {
    float sum = (x[0] + x[1]) + (x[2] + x[3]);
    sum += __shfl_xor_sync(~0u, sum, 8);
    return sum + __shfl_xor_sync(~0u, sum, 16);
  }
};

// f with the smallest kDim that a head of `dim` fits in.
template <class F>
void with_dim(int64_t dim, const F& f) {
  if (dim <= 32) return f(std::integral_constant<int, 32>());
  if (dim <= 64) return f(std::integral_constant<int, 64>());
  f(std::integral_constant<int, static_cast<int>(kMostCudaDim)>());
}

}  // namespace pyllm::cuda

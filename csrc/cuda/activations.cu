// Activations, plain and gated: every element alone, in packs of 16 bytes where the rows allow. The floor is the memory
// read and written. Backward computes f and its slope again from the input.
#include "cuda/activations.h"

#include "cuda/numbers.h"

namespace pyllm::cuda {
namespace {

// f(x), and its slope. NaN stays NaN.
struct Value {
  float y, slope;
};
__device__ __forceinline__ Value activate(Activation kind, float x) {
  switch (kind) {
    case Activation::gelu: {  // by the tail's mass, so that nothing cancels
      if (fabsf(x) > 14.5f) return {x < 0.0f ? 0.0f : x, x < 0.0f ? 0.0f : 1.0f};
      const float below = 0.5f * erfcf(x * -0.70710678118654752f);
      return {x * below, fmaf(x * 0.39894228040143268f, expf(-0.5f * x * x), below)};
    }
    case Activation::gelu_tanh: {
      constexpr float kTwice = 1.5957691216057308f, kCube = 0.044715f;         // 2 sqrt(2 / pi)
      const float c = x < -13.0f ? -13.0f : x > 13.0f ? 13.0f : x, z = c * c;  // beyond, the sigmoid is 0 or 1
      const float s = sigmoid(c * kTwice * fmaf(z, kCube, 1.0f));
      return {x * s, fmaf(c * s * (1.0f - s), kTwice * fmaf(z, 3 * kCube, 1.0f), s)};
    }
    case Activation::silu: {
      const float s = sigmoid(x);
      return {x * s, s * fmaf(x, 1.0f - s, 1.0f)};
    }
    case Activation::sigmoid: {
      const float s = sigmoid(x);
      return {s, s * (1.0f - s)};
    }
    case Activation::tanh: {
      const float y = tanhf(x);
      return {y, fmaf(-y, y, 1.0f)};
    }
    case Activation::relu_squared: {
      const float y = x < 0.0f ? 0.0f : x;
      return {y * y, y + y};
    }
  }
  return {0, 0};
}

// f(row, column) for each pack of rows x cols.
template <class T, class F>
__device__ __forceinline__ void each_pack(int64_t rows, int64_t cols, const F& f) {
  const int64_t across = divided_up(cols, Pack<T>::kSize), packs = rows * across;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < packs;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x)
    f(i / across, i % across * Pack<T>::kSize);
}

template <class T>
__global__ void __launch_bounds__(256) forward(ActivationArgs a, bool whole) {
  each_pack<T>(a.gate_rows.count, a.cols, [&](int64_t row, int64_t i) {
    const int64_t left = a.cols - i;
    Pack<T> p = load_pack(reinterpret_cast<const T*>(a.gate) + a.gate_rows.offset(row) + i, left, whole);
#pragma unroll
    for (int k = 0; k < Pack<T>::kSize; k++) p.x[k] = activate(a.kind, p.x[k]).y;
    if (a.up) {
      const Pack<T> up = load_pack(reinterpret_cast<const T*>(a.up) + a.up_rows.offset(row) + i, left, whole);
#pragma unroll
      for (int k = 0; k < Pack<T>::kSize; k++) p.x[k] *= up.x[k];
    }
    store_pack(reinterpret_cast<T*>(a.out) + row * a.cols + i, p, left, whole);
  });
}

template <class T>
__global__ void __launch_bounds__(256) backward(ActivationBackwardArgs a, bool whole) {
  each_pack<T>(a.gate_rows.count, a.cols, [&](int64_t row, int64_t i) {
    const int64_t left = a.cols - i;
    Pack<T> gate = load_pack(reinterpret_cast<const T*>(a.gate) + a.gate_rows.offset(row) + i, left, whole);
    const Pack<T> dy = load_pack(reinterpret_cast<const T*>(a.dy) + a.dy_rows.offset(row) + i, left, whole);
    if (!a.up) {
#pragma unroll
      for (int k = 0; k < Pack<T>::kSize; k++) gate.x[k] = dy.x[k] * activate(a.kind, gate.x[k]).slope;
    } else {
      Pack<T> up = load_pack(reinterpret_cast<const T*>(a.up) + a.up_rows.offset(row) + i, left, whole);
#pragma unroll
      for (int k = 0; k < Pack<T>::kSize; k++) {
        const Value f = activate(a.kind, gate.x[k]);
        gate.x[k] = dy.x[k] * up.x[k] * f.slope;
        up.x[k] = dy.x[k] * f.y;
      }
      store_pack(reinterpret_cast<T*>(a.dup) + row * a.cols + i, up, left, whole);
    }
    store_pack(reinterpret_cast<T*>(a.dgate) + row * a.cols + i, gate, left, whole);
  });
}

int64_t grid_for(int64_t rows, int64_t cols, int64_t pack) {
  return blocks_for(divided_up(rows * divided_up(cols, pack), 256));
}

}  // namespace

void activation_forward(const ActivationArgs& a, const Work& work) {
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const bool whole = whole_rows(a.gate, a.gate_rows, sizeof(T)) && whole_rows(a.up, a.up_rows, sizeof(T)) &&
                       whole_packs(a.out, a.gate_rows.count > 1 ? a.cols * sizeof(T) : 0);
    launch(forward<T>, {grid_for(a.gate_rows.count, a.cols, Pack<T>::kSize)}, dim3(256), 0, work, a, whole);
  });
}

void activation_backward(const ActivationBackwardArgs& a, const Work& work) {
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const int64_t row_bytes = a.gate_rows.count > 1 ? a.cols * sizeof(T) : 0;
    const bool whole = whole_rows(a.gate, a.gate_rows, sizeof(T)) && whole_rows(a.up, a.up_rows, sizeof(T)) &&
                       whole_rows(a.dy, a.dy_rows, sizeof(T)) && whole_packs(a.dgate, row_bytes) &&
                       whole_packs(a.dup, row_bytes);
    launch(backward<T>, {grid_for(a.gate_rows.count, a.cols, Pack<T>::kSize)}, dim3(256), 0, work, a, whole);
  });
}

}  // namespace pyllm::cuda

// Copies and plain arithmetic between tensors of any strides, an element a thread: what a model does between its products.
#include "cuda/elementwise.h"

#include "cuda/numbers.h"

namespace pyllm::cuda {
namespace {

struct Offsets {
  int64_t a, b, out;
};

// f(where each tensor's element is) for every element.
template <class F>
__device__ __forceinline__ void each(const ElementwiseArgs& e, int64_t count, const F& f) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    Offsets at{0, 0, 0};
    int64_t rest = i;
    for (int d = e.ndim - 1; d >= 0; d--) {
      const int64_t k = d > 0 ? rest % e.shape[d] : rest;  // no division where all lies in one row
      if (d > 0) rest /= e.shape[d];
      at.a += k * e.a_step[d];
      at.b += k * e.b_step[d];
      at.out += k * e.out_step[d];
    }
    f(at);
  }
}

__global__ void __launch_bounds__(256) floats(ElementwiseArgs e, int64_t count) {
  each(e, count, [&](Offsets at) {
    const float a = float_at(e.a, e.a_dtype, at.a), b = e.b ? float_at(e.b, e.b_dtype, at.b) : 0.0f;
    float y = a;
    switch (e.kind) {
      case Elementwise::add:
        y = a + b;
        break;
      case Elementwise::subtract:
        y = a - b;
        break;
      case Elementwise::multiply:
        y = a * b;
        break;
      case Elementwise::divide:
        y = a / b;
        break;
      case Elementwise::relu:
        y = a < 0.0f ? 0.0f : a;  // NaN stays NaN
        break;
      default:
        break;
    }
    put_at(e.out, e.out_dtype, at.out, y);
  });
}

__global__ void __launch_bounds__(256) integers(ElementwiseArgs e, int64_t count) {
  each(e, count, [&](Offsets at) {
    const int64_t a = reinterpret_cast<const int64_t*>(e.a)[at.a], b = reinterpret_cast<const int64_t*>(e.b)[at.b];
    const auto p = static_cast<uint64_t>(a), q = static_cast<uint64_t>(b);  // overflow wraps, as in torch
    int64_t y = a;
    switch (e.kind) {
      case Elementwise::add:
        y = static_cast<int64_t>(p + q);
        break;
      case Elementwise::subtract:
        y = static_cast<int64_t>(p - q);
        break;
      case Elementwise::multiply:
        y = static_cast<int64_t>(p * q);
        break;
      case Elementwise::minimum:
        y = a < b ? a : b;
        break;
      case Elementwise::maximum:
        y = a < b ? b : a;
        break;
      default:
        break;
    }
    reinterpret_cast<int64_t*>(e.out)[at.out] = y;
  });
}

template <class Word>
__global__ void __launch_bounds__(256) words(ElementwiseArgs e, int64_t count) {
  each(e, count,
       [&](Offsets at) { reinterpret_cast<Word*>(e.out)[at.out] = reinterpret_cast<const Word*>(e.a)[at.a]; });
}

}  // namespace

void elementwise(const ElementwiseArgs& a, const Work& work) {
  int64_t count = 1;
  for (int d = 0; d < a.ndim; d++) count *= a.shape[d];
  const auto run = [&](void (*kernel)(ElementwiseArgs, int64_t)) {
    launch(kernel, {blocks_for(divided_up(count, 256))}, dim3(256), 0, work, a, count);
  };
  const bool floating = a.a_dtype == DType::f32 || a.a_dtype == DType::bf16 || a.a_dtype == DType::f16;
  if (a.kind == Elementwise::copy && a.a_dtype == a.out_dtype) {
    const int64_t size = size_of(a.a_dtype);
    run(size == 8 ? words<uint64_t> : size == 4 ? words<uint32_t> : size == 2 ? words<uint16_t> : words<uint8_t>);
  } else {
    run(floating ? floats : integers);
  }
}

}  // namespace pyllm::cuda

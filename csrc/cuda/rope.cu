// Rotary position embedding. A block takes a position of a sequence: its sines and cosines are computed once, to shared
// memory, and turn all heads. The angle is a product of floats, as on the CPU; its sine and cosine are those of that float.
#include "cuda/rope.h"

#include "cuda/numbers.h"

namespace pyllm::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(256) turn(RopeArgs a) {
  auto* cosines = reinterpret_cast<float*>(shared_memory());
  const int64_t half = a.rotary / 2, rows = a.batch * a.length;
  float* sines = cosines + half;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t b = row / a.length, t = row % a.length;
    const auto position = static_cast<float>(integer_at(a.positions, a.positions_dtype, a.shared ? t : row));
    __syncthreads();  // the row before has been turned
    for (int64_t i = threadIdx.x; i < half; i += blockDim.x) {
      const float angle = position * a.inv_freq[i];
      sines[i] = sinf(angle) * (a.inverse ? -a.scale : a.scale);
      cosines[i] = cosf(angle) * a.scale;
    }
    __syncthreads();
    const T* x = reinterpret_cast<const T*>(a.x) + b * a.x_batch + t * a.x_time;
    T* out = reinterpret_cast<T*>(a.out) + row * a.heads * a.width;
    const int64_t rest = a.width - a.rotary, pieces = half + rest;  // of a head: pairs, then what is copied
    for (int64_t i = threadIdx.x; i < a.heads * pieces; i += blockDim.x) {
      const int64_t head = i / pieces, piece = i % pieces;
      const T* from = x + head * a.x_head;
      T* to = out + head * a.width;
      if (piece >= half) {
        to[a.rotary + piece - half] = from[a.rotary + piece - half];
        continue;
      }
      const int64_t one = a.interleaved ? 2 * piece : piece, other = a.interleaved ? one + 1 : piece + half;
      const float u = to_float(from[one]), v = to_float(from[other]), c = cosines[piece], s = sines[piece];
      to[one] = from_float<T>(fmaf(-v, s, u * c));
      to[other] = from_float<T>(fmaf(u, s, v * c));
    }
  }
}

}  // namespace

void rope(const RopeArgs& a, const Work& work) {
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const int64_t threads = std::clamp<int64_t>(divided_up(a.heads * a.width / 2, kWarp), 1, 8) * kWarp;
    launch(turn<T>, {blocks_for(a.batch * a.length)}, dim3(static_cast<unsigned>(threads)), a.rotary * sizeof(float),
           work, a);
  });
}

}  // namespace pyllm::cuda

// RWKV-7's recurrence, forward: a block a head, as told in wkv_columns.h. A step is five multiply-adds an element of the
// state, and what is read and written is its factors and outputs alone: arithmetic, and the latency of a step, are the
// floor.
#include "cuda/wkv.h"

#include <type_traits>

#include "cuda/wkv_columns.h"

namespace pyllm::cuda {
namespace {

constexpr int kInputs = 6;

template <class T, int kDim>
__global__ void __launch_bounds__(4 * kDim, 128 / kDim) forward(WkvArgs a, FaultRecord* record) {
  const WkvShape& s = a.shape;
  const int64_t place = blockIdx.x, batch = place / s.heads, head = place % s.heads, square = s.dim * s.dim;
  const int64_t length = length_of(s, batch, record), chunks = s.time > 0 ? (s.time - 1) / kWkvChunk : 0;
  float* const rows = reinterpret_cast<float*>(shared_memory());
  T* const y = reinterpret_cast<T*>(a.y) + (batch * s.time * s.heads + head) * s.dim;
  const int64_t y_step = s.heads * s.dim;
  Factors<T, kDim, kInputs, kInputs> factors(s, s.r, batch, head, rows);  // no dy
  Columns<kDim> columns;
  columns.load(s.state ? s.state + place * square : nullptr, s.dim);
  const bool writes = columns.part == 0 && columns.column < s.dim;
  const auto count_from = [&](int64_t t) { return length - t < kWkvChunk ? length - t : kWkvChunk; };
  if (length > 0) factors.fetch(0, count_from(0));
  for (int64_t first = 0; first < length; first += kWkvChunk) {
    if (first > 0 && a.kept) columns.store(a.kept + (place * chunks + first / kWkvChunk - 1) * square, s.dim);
    __syncthreads();
    factors.put();
    __syncthreads();
    const int64_t count = count_from(first);
    if (first + kWkvChunk < length) factors.fetch(first + kWkvChunk, count_from(first + kWkvChunk));
    for (int64_t t = 0; t < count; t++) {
      float sum;
      const float out = columns.step(rows + t * kInputs * kDim, sum);
      if (writes) y[(first + t) * y_step + columns.column] = from_float<T>(out);
    }
  }
  columns.store(a.final_state + place * square, s.dim);
  if (writes)
    for (int64_t t = length; t < s.time; t++) y[t * y_step + columns.column] = from_float<T>(0.0f);
}

}  // namespace

void wkv_forward(const WkvArgs& a, const Work& work) {
  const WkvShape& s = a.shape;
  if (s.dim == 0) return;
  with_dtype(s.dtype, [&](auto* tag) {
    with_dim(s.dim, [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      launch(forward<std::remove_pointer_t<decltype(tag)>, kDim>, {s.batch * s.heads}, dim3(4 * kDim),
             kWkvChunk * kInputs * kDim * sizeof(float), work, a, fault_record(work.device));
    });
  });
}

}  // namespace pyllm::cuda

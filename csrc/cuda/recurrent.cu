// The steps of a recurrent layer, forward, once the products of its inputs are there: how they are given to blocks is told
// in recurrent_steps.h. The hidden state goes from step to step through global memory, rounded to the storage type, as a
// caller of the cells carries it; a cell state is only ever read by the thread that wrote it. A sequence that is over, or,
// in reverse, has not begun, passes its state on.
#include "cuda/recurrent.h"

#include "cuda/recurrent_steps.h"

namespace pyllm::cuda {
namespace {

template <class T>
struct Room {
  T* hidden;  // (2, batch, hidden_step): before and after a step, in turn
  int64_t hidden_step;
  float *cell, *bias;      // (batch, hidden); (gates, hidden), of a gru a fourth: the new gate's part of b_hh
  const int64_t* lengths;  // or null
  unsigned long long* arrived;
};

template <class T>
__global__ void __launch_bounds__(256)
    begin(RecurrentStepsArgs a, Room<T> room, int64_t* lengths, int64_t groups, FaultRecord* record) {
  const RecurrentShape& s = a.shape;
  const bool gru = s.kind == Recurrence::gru, lstm = s.kind == Recurrence::lstm;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = first; i < s.batch * s.hidden; i += step) {
    const int64_t b = i / s.hidden, j = i % s.hidden;
    const T h = from_float<T>(s.h0.data ? element_of<T>(s.h0, b, j) : 0.0f);
    room.hidden[b * room.hidden_step + j] = h;
    reinterpret_cast<T*>(a.h_n)[i] = h;
    if (!lstm) continue;
    room.cell[i] = s.c0.data ? element_of<T>(s.c0, b, j) : 0.0f;
    reinterpret_cast<T*>(a.c_n)[i] = from_float<T>(room.cell[i]);
  }
  const int64_t width = gates_of(s.kind) * s.hidden, summed = gru ? 2 * s.hidden : width;
  for (int64_t i = first; i < (gru ? 4 * s.hidden : width); i += step) {
    float x = 0;
    if (a.b_ih.data && i < width) x += element_of<T>(a.b_ih, 0, i);
    if (a.b_hh.data && (i < summed || i >= width)) x += element_of<T>(a.b_hh, 0, i < width ? i : i - s.hidden);
    room.bias[i] = x;
  }
  begin_steps(s, lengths, room.arrived, groups, record, first, step);
}

// Step t of sequence b, unit j. product(gate): that of the hidden state and w_hh.
template <class T, class F>
__device__ __forceinline__ void advance(const RecurrentStepsArgs& a, const Room<T>& room, int64_t t, int64_t b,
                                        int64_t j, T old, T* next, const F& product) {
  const RecurrentShape& s = a.shape;
  const int64_t n = s.hidden, row = t * s.batch + b, at = b * n + j, length = room.lengths ? room.lengths[b] : s.time;
  T* const y = reinterpret_cast<T*>(a.y) + row * a.y_step + j;
  if (t >= length) {
    *y = from_float<T>(0.0f);
    *next = old;
    return;
  }
  const bool last = s.reverse ? t == 0 : t + 1 == length;
  const float* const sums = a.sums + row * gates_of(s.kind) * n + j;
  const float* const bias = room.bias + j;
  float* const kept = a.keep.gates ? a.keep.gates + row * gates_of(s.kind) * n + j : nullptr;
  const auto input = [&](int gate) { return sums[gate * n] + bias[gate * n]; };
  float h;
  if (s.kind == Recurrence::lstm) {
    const float in = sigmoid(input(0) + product(0)), forget = sigmoid(input(1) + product(1));
    const float fresh = tanhf(input(2) + product(2)), out = sigmoid(input(3) + product(3));
    const T cell = from_float<T>(fmaf(forget, room.cell[at], in * fresh));
    const float squashed = tanhf(to_float(cell));
    h = out * squashed;
    room.cell[at] = to_float(cell);
    if (last) reinterpret_cast<T*>(a.c_n)[at] = cell;
    if (kept) {
      kept[0] = in;
      kept[n] = forget;
      kept[2 * n] = fresh;
      kept[3 * n] = out;
      a.keep.tanh_cell[row * n + j] = squashed;
      reinterpret_cast<T*>(a.keep.cell)[row * n + j] = cell;
    }
  } else if (s.kind == Recurrence::gru) {
    const float reset = sigmoid(input(0) + product(0)), update = sigmoid(input(1) + product(1));
    const float hidden = product(2) + bias[3 * n];
    const float fresh = tanhf(fmaf(reset, hidden, input(2)));
    h = fmaf(update, to_float(old) - fresh, fresh);
    if (kept) {
      kept[0] = reset;
      kept[n] = update;
      kept[2 * n] = fresh;
      a.keep.new_hidden[row * n + j] = hidden;
    }
  } else {
    const float x = input(0) + product(0);
    h = s.kind == Recurrence::rnn_tanh ? tanhf(x) : x < 0.0f ? 0.0f : x;
    if (kept) kept[0] = h;
  }
  const T rounded = from_float<T>(h);
  *next = rounded;
  *y = rounded;
  if (last) reinterpret_cast<T*>(a.h_n)[at] = rounded;
}

template <class T>
__global__ void __launch_bounds__(kMostThreads)
    forward(RecurrentStepsArgs a, Share share, const T* w, int64_t w_step, Room<T> room, int64_t first, int64_t last) {
  const RecurrentShape& s = a.shape;
  Products<T> products(share, w, w_step);
  const auto time_of = [&](int64_t step) { return s.reverse ? s.time - 1 - step : step; };
  for (int64_t step = first; step < last; step++) {
    const T* before = room.hidden + step % 2 * s.batch * room.hidden_step;
    T* after = room.hidden + (step + 1) % 2 * s.batch * room.hidden_step;
    products.each_tile([&](int64_t b0, int count) {
      products.run(before + b0 * room.hidden_step, room.hidden_step, count);
      products.each_item(b0, count, [&](int64_t b, int64_t j, int item) {
        const int64_t at = b * room.hidden_step + j;
        advance(a, room, time_of(step), b, j, before[at], after + at,
                [&](int gate) { return products.total(gate, item); });
      });
    });
    if (step + 1 == last) break;
    products.each_tile([&](int64_t b0, int count) {
      products.each_item(b0, count, [&](int64_t b, int64_t j, int) {
        const int64_t row = time_of(step + 1) * s.batch + b;
        for (int gate = 0; gate < share.gates; gate++) prefetch(a.sums + (row * share.gates + gate) * s.hidden + j);
      });
    });
    meet_blocks(room.arrived + blockIdx.y, static_cast<unsigned long long>(step + 1 - first) * gridDim.x);
  }
}

template <class T>
void run(const RecurrentStepsArgs& a, const Work& work) {
  const RecurrentShape& s = a.shape;
  const int64_t gates = gates_of(s.kind), width = gates * s.hidden, step = round_up(s.hidden, 8);
  const Shared shared = share_of<T>(s.batch, s.hidden, static_cast<int>(gates), s.hidden, s.time, work);
  const bool packed = !in_packs<T>(s.w_hh) && s.time > 0;
  Parts parts;
  const int64_t hidden = parts.take(2 * s.batch * step * sizeof(T));
  const int64_t cell = parts.take(s.kind == Recurrence::lstm ? s.batch * s.hidden * sizeof(float) : 0);
  const int64_t bias = parts.take((width + s.hidden) * sizeof(float));
  const int64_t lengths = parts.take(s.lengths ? s.batch * sizeof(int64_t) : 0);
  const int64_t arrived = parts.take(shared.grid.y * sizeof(unsigned long long));
  const int64_t weights = parts.take(packed ? width * step * sizeof(T) : 0);
  const Scratch scratch(work, parts.bytes());
  char* const base = scratch.as<char>();
  auto* const checked = s.lengths ? reinterpret_cast<int64_t*>(base + lengths) : nullptr;
  const Room<T> room{
      reinterpret_cast<T*>(base + hidden),   step,    reinterpret_cast<float*>(base + cell),
      reinterpret_cast<float*>(base + bias), checked, reinterpret_cast<unsigned long long*>(base + arrived)};
  const int64_t most = std::max({s.batch * s.hidden, 4 * s.hidden, s.batch, shared.grid.y});
  launch(begin<T>, {blocks_for(divided_up(most, 256))}, dim3(256), 0, work, a, room, checked, shared.grid.y,
         fault_record(work.device));
  const T* w = reinterpret_cast<const T*>(s.w_hh.data);
  if (packed) {
    auto* const out = reinterpret_cast<T*>(base + weights);
    launch(pack_rows<T>, {divided_up(width, 32), divided_up(s.hidden, 32)}, dim3(kWarp, 8), 0, work, s.w_hh, width,
           s.hidden, out, step);
    w = out;
  }
  launch_steps(forward<T>, shared, work, a, w, packed ? step : s.w_hh.row, room, s.time);
}

}  // namespace

void recurrent_steps(const RecurrentStepsArgs& a, const Work& work) {
  if (a.shape.batch == 0 || a.shape.hidden == 0) return;
  with_dtype(a.shape.dtype, [&](auto* tag) { run<std::remove_pointer_t<decltype(tag)>>(a, work); });
}

}  // namespace pyllm::cuda

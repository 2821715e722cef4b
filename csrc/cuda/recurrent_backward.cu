// The steps of a recurrent layer, backward: from the last step taken to the first, dy and the gradient carried from the
// step after become gradients of the gates' sums, and those of the products with w_hh go, through w_hh, to the state
// before. They are rounded to the storage type for that, as for the products with inputs and states that follow in torch;
// what a step carries past w_hh stays in float32, with the thread that owns the unit. A sequence that takes no part in a
// step keeps its gradients.
#include "cuda/recurrent.h"
#include "cuda/recurrent_steps.h"

namespace pyllm::cuda {
namespace {

template <class T>
struct Room {
  T* products;  // (2, batch, width_step): the gradients of a step's products, in turn
  int64_t width_step;
  float *dh, *dc;          // (batch, hidden): of the hidden state, less what comes through w_hh; of the cell state
  const int64_t* lengths;  // or null
  unsigned long long* arrived;
};

template <class T>
__global__ void __launch_bounds__(256)
    begin(RecurrentStepsBackwardArgs a, Room<T> room, int64_t* lengths, int64_t groups, FaultRecord* record) {
  const RecurrentShape& s = a.shape;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = first; i < s.batch * s.hidden; i += step) {
    room.dh[i] = a.dh_n ? to_float(reinterpret_cast<const T*>(a.dh_n)[i]) : 0.0f;
    if (s.kind == Recurrence::lstm) room.dc[i] = a.dc_n ? to_float(reinterpret_cast<const T*>(a.dc_n)[i]) : 0.0f;
  }
  begin_steps(s, lengths, room.arrived, groups, record, first, step);
}

// The state before a step, at its sequence's start the initial one, else `before`.
template <class T>
__device__ __forceinline__ float state_before(const StridedMatrix& initial, bool start, int64_t b, int64_t j,
                                              const T* before) {
  if (!start) return to_float(*before);
  return initial.data ? element_of<T>(initial, b, j) : 0.0f;
}

// Step t of sequence b, unit j; dh: the gradient of the state after it, without dy.
template <class T>
__device__ __forceinline__ void retreat(const RecurrentStepsBackwardArgs& a, const Room<T>& room, int64_t t, int64_t b,
                                        int64_t j, float dh, T* products) {
  const RecurrentShape& s = a.shape;
  const int64_t n = s.hidden, row = t * s.batch + b, at = b * n + j, length = room.lengths ? room.lengths[b] : s.time;
  const int64_t place = row * gates_of(s.kind) * n + j;
  T* const dsums = reinterpret_cast<T*>(a.dsums) + place;
  T* const dproducts = a.dproducts ? reinterpret_cast<T*>(a.dproducts) + place : nullptr;
  const auto put = [&](int gate, float sum, float product) {
    dsums[gate * n] = from_float<T>(sum);
    const T rounded = from_float<T>(product);
    if (dproducts) dproducts[gate * n] = rounded;
    products[gate * n] = rounded;
  };
  if (t >= length) {
    for (int gate = 0; gate < gates_of(s.kind); gate++) put(gate, 0.0f, 0.0f);
    room.dh[at] = dh;
    return;
  }
  const bool start = s.reverse ? t + 1 == length : t == 0;
  const int64_t before = row + (s.reverse ? s.batch : -s.batch);
  const float* const gates = a.kept.gates + place;
  if (a.dy) dh += to_float(reinterpret_cast<const T*>(a.dy)[t * a.dy_time + b * a.dy_batch + j]);
  if (s.kind == Recurrence::lstm) {
    const float in = gates[0], forget = gates[n], fresh = gates[2 * n], out = gates[3 * n];
    const float squashed = a.kept.tanh_cell[row * n + j];
    const float dc = fmaf(dh * out, 1.0f - squashed * squashed, room.dc[at]);
    const float cell = state_before(s.c0, start, b, j, reinterpret_cast<const T*>(a.kept.cell) + before * n + j);
    const float din = dc * fresh * in * (1.0f - in), dforget = dc * cell * forget * (1.0f - forget);
    const float dfresh = dc * in * (1.0f - fresh * fresh), dout = dh * squashed * out * (1.0f - out);
    room.dc[at] = dc * forget;
    room.dh[at] = 0;
    put(0, din, din);
    put(1, dforget, dforget);
    put(2, dfresh, dfresh);
    put(3, dout, dout);
  } else if (s.kind == Recurrence::gru) {
    const float reset = gates[0], update = gates[n], fresh = gates[2 * n], hidden = a.kept.new_hidden[row * n + j];
    const float h = state_before(s.h0, start, b, j, reinterpret_cast<const T*>(a.y) + before * a.y_step + j);
    const float dnew = dh * (1.0f - update) * (1.0f - fresh * fresh);
    const float dreset = dnew * hidden * reset * (1.0f - reset);
    const float dupdate = dh * (h - fresh) * update * (1.0f - update);
    room.dh[at] = dh * update;
    put(0, dreset, dreset);
    put(1, dupdate, dupdate);
    put(2, dnew, dnew * reset);
  } else {
    const float y = gates[0];
    const float dsum = s.kind == Recurrence::rnn_tanh ? dh * (1.0f - y * y) : y > 0.0f ? dh : 0.0f;
    room.dh[at] = 0;
    put(0, dsum, dsum);
  }
}

// The last step, number `time`, is not one of the layer: it makes the gradients of the initial states.
template <class T>
__global__ void __launch_bounds__(kMostThreads) backward(RecurrentStepsBackwardArgs a, Share share, const T* w,
                                                         int64_t w_step, Room<T> room, int64_t first, int64_t last) {
  const RecurrentShape& s = a.shape;
  Products<T> products(share, w, w_step);
  const auto time_of = [&](int64_t step) { return s.reverse ? step : s.time - 1 - step; };
  for (int64_t step = first; step < last; step++) {
    const T* before = room.products + (step + 1) % 2 * s.batch * room.width_step;
    T* after = room.products + step % 2 * s.batch * room.width_step;
    products.each_tile([&](int64_t b0, int count) {
      if (step > 0) products.run(before + b0 * room.width_step, room.width_step, count);
      products.each_item(b0, count, [&](int64_t b, int64_t j, int item) {
        const int64_t at = b * s.hidden + j;
        float dh = room.dh[at];
        if (step > 0 && time_of(step - 1) < (room.lengths ? room.lengths[b] : s.time)) dh += products.total(0, item);
        if (step < s.time) return retreat(a, room, time_of(step), b, j, dh, after + b * room.width_step + j);
        if (a.dh0) reinterpret_cast<T*>(a.dh0)[at] = from_float<T>(dh);
        if (a.dc0) reinterpret_cast<T*>(a.dc0)[at] = from_float<T>(room.dc[at]);
      });
    });
    if (step + 1 == last) break;
    if (step + 1 < s.time)
      products.each_tile([&](int64_t b0, int count) {
        products.each_item(b0, count, [&](int64_t b, int64_t j, int) {
          const int64_t row = time_of(step + 1) * s.batch + b, gates = gates_of(s.kind);
          for (int64_t gate = 0; gate < gates; gate++) prefetch(a.kept.gates + (row * gates + gate) * s.hidden + j);
          if (a.kept.tanh_cell) prefetch(a.kept.tanh_cell + row * s.hidden + j);
          if (a.kept.new_hidden) prefetch(a.kept.new_hidden + row * s.hidden + j);
        });
      });
    meet_blocks(room.arrived + blockIdx.y, static_cast<unsigned long long>(step + 1 - first) * gridDim.x);
  }
}

template <class T>
void run(const RecurrentStepsBackwardArgs& a, const Work& work) {
  const RecurrentShape& s = a.shape;
  const int64_t width = gates_of(s.kind) * s.hidden, step = round_up(width, 8);
  const int64_t steps = s.time + (a.dh0 || a.dc0 ? 1 : 0);
  const Shared shared = share_of<T>(s.batch, s.hidden, 1, width, steps, work);
  Parts parts;
  const int64_t products = parts.take(2 * s.batch * step * sizeof(T));
  const int64_t dh = parts.take(s.batch * s.hidden * sizeof(float));
  const int64_t dc = parts.take(s.kind == Recurrence::lstm ? s.batch * s.hidden * sizeof(float) : 0);
  const int64_t lengths = parts.take(s.lengths ? s.batch * sizeof(int64_t) : 0);
  const int64_t arrived = parts.take(shared.grid.y * sizeof(unsigned long long));
  const int64_t weights = parts.take(s.hidden * step * sizeof(T));
  const Scratch scratch(work, parts.bytes());
  char* const base = scratch.as<char>();
  auto* const checked = s.lengths ? reinterpret_cast<int64_t*>(base + lengths) : nullptr;
  const Room<T> room{
      reinterpret_cast<T*>(base + products), step,    reinterpret_cast<float*>(base + dh),
      reinterpret_cast<float*>(base + dc),   checked, reinterpret_cast<unsigned long long*>(base + arrived)};
  const int64_t most = std::max({s.batch * s.hidden, s.batch, shared.grid.y});
  launch(begin<T>, {blocks_for(divided_up(most, 256))}, dim3(256), 0, work, a, room, checked, shared.grid.y,
         fault_record(work.device));
  // Unit j's row of the weight is w_hh's column j.
  auto* const w = reinterpret_cast<T*>(base + weights);
  const StridedMatrix transposed{s.w_hh.data, s.w_hh.column, s.w_hh.row};
  launch(pack_rows<T>, {divided_up(s.hidden, 32), divided_up(width, 32)}, dim3(kWarp, 8), 0, work, transposed, s.hidden,
         width, w, step);
  launch_steps<RecurrentStepsBackwardArgs, T>(backward<T>, shared, work, a, w, step, room, steps);
}

}  // namespace

void recurrent_steps_backward(const RecurrentStepsBackwardArgs& a, const Work& work) {
  if (a.shape.batch == 0 || a.shape.hidden == 0) return;
  with_dtype(a.shape.dtype, [&](auto* tag) { run<std::remove_pointer_t<decltype(tag)>>(a, work); });
}

}  // namespace pyllm::cuda

// RWKV-7's recurrence, backward. A block takes heads of sequences one after the other, and goes through each from the end,
// chunk by chunk: from the state that the forward pass kept before a chunk, its states are made again by columns, with the
// forward pass's own steps, and written to scratch memory, which mostly stays in the second-level cache.
//
// With G the gradient of the state after a step, what reached y included (rows are keys, as the state's):
//     dk = G v    db = G s    dv = G' k    ds = G' b    dw = exp(w) * row sums of (G * S)    da = S ds    dr = S after it dy
// and for the step before, whose state S is: G <- diag(exp(w)) G + a ds. For these, four lanes share a row of G and of the
// state, in registers, each with every fourth group of four columns: five of the seven sums are over rows, two shuffles
// each; dv and ds are over columns, first in a warp's eight rows, then over the warps through shared memory.
#include <type_traits>

#include "cuda/wkv.h"
#include "cuda/wkv_columns.h"

namespace pyllm::cuda {
namespace {

constexpr int kInputs = 7, kS = kInputs, kRows = 8;  // of a step in shared memory: its factors, dy, and s
constexpr int64_t kMostBlocks = 264, kMostScratch = 256 << 20;

template <int kDim>
constexpr int kWarps = 4 * kDim / kWarp;
template <int kDim>  // the chunk's rows, the warps' sums for dv and ds, and ds
constexpr int64_t kShared = (kWkvChunk * kRows + 2 * kWarps<kDim> + 1) * kDim * sizeof(float);
template <int kDim>
constexpr int64_t kStates = (kWkvChunk + 1) * kDim * kDim;  // floats of a block

template <class T, int kDim>
class Backward {
  static constexpr int kColumns = kDim / 4;

 public:
  __device__ Backward(const WkvBackwardArgs& a, int64_t place, float* states, FaultRecord* record)
      : a_(a),
        s_(a.shape),
        place_(place),
        batch_(place / s_.heads),
        head_(place % s_.heads),
        length_(length_of(s_, batch_, record)),
        start_((batch_ * s_.time * s_.heads + head_) * s_.dim),
        states_(states),
        rows_(reinterpret_cast<float*>(shared_memory())),
        sums_(rows_ + kWkvChunk * kRows * kDim),
        ds_(sums_ + 2 * kWarps<kDim> * kDim),
        lane_(threadIdx.x % kWarp),
        warp_(threadIdx.x / kWarp),
        quarter_(lane_ % 4),
        key_(warp_ * 8 + lane_ / 4) {}

  __device__ void run() {
    const int64_t square = s_.dim * s_.dim, chunks = s_.time > 0 ? (s_.time - 1) / kWkvChunk : 0;
    Factors<T, kDim, kInputs, kRows> factors(s_, a_.dy, batch_, head_, rows_);
    const bool inside = key_ < s_.dim;
    const auto place_of = [&](int i) { return place_ * square + key_ * s_.dim + column(i); };
#pragma unroll
    for (int i = 0; i < kColumns; i++)
      g_[i] = a_.dfinal && inside && column(i) < s_.dim ? a_.dfinal[place_of(i)] : 0.0f;
    for (int64_t first = (length_ - 1) / kWkvChunk * kWkvChunk; first >= 0 && length_ > 0; first -= kWkvChunk) {
      const int count = static_cast<int>(length_ - first < kWkvChunk ? length_ - first : kWkvChunk);
      factors.fetch(first, count);
      __syncthreads();
      factors.put();
      __syncthreads();
      const float* before = s_.state ? s_.state + place_ * square : nullptr;
      if (first > 0) before = a_.kept + (place_ * chunks + first / kWkvChunk - 1) * square;
      make_states(before, count);
      __syncthreads();
      load_state(count);
      for (int t = count - 1; t >= 0; t--) retreat(first + t, t);
    }
    if (a_.dstate)
#pragma unroll
      for (int i = 0; i < kColumns; i++)
        if (inside && column(i) < s_.dim) a_.dstate[place_of(i)] = g_[i];
    if (threadIdx.x < s_.dim)
      for (char* gradient : {a_.dr, a_.dw, a_.dk, a_.dv, a_.da, a_.db})
        for (int64_t t = length_; t < s_.time; t++) at(gradient, t)[threadIdx.x] = from_float<T>(0.0f);
  }

 private:
  __device__ T* at(char* gradient, int64_t t) const {
    return reinterpret_cast<T*>(gradient) + start_ + t * s_.heads * s_.dim;
  }
  __device__ int column(int i) const { return i / 4 * 16 + quarter_ * 4 + i % 4; }

  // The states before each step and after the last, in rows of kDim.
  __device__ void make_states(const float* before, int count) {
    Columns<kDim> columns;
    columns.load(before, s_.dim);
    columns.store(states_, kDim);
    for (int t = 0; t < count; t++) {
      float sum;
      columns.step(rows_ + t * kRows * kDim, sum);
      if (columns.part == 0) rows_[(t * kRows + kS) * kDim + columns.column] = sum;
      columns.store(states_ + (t + 1) * kDim * kDim, kDim);
    }
  }

  __device__ void load_state(int t) {
    const float* row = states_ + (t * kDim + key_) * kDim;
#pragma unroll
    for (int i = 0; i < kColumns; i += 4) {
      const float4 x = *reinterpret_cast<const float4*>(row + column(i));
      state_[i] = x.x;
      state_[i + 1] = x.y;
      state_[i + 2] = x.z;
      state_[i + 3] = x.w;
    }
  }

  // f(i, value of the thread's column i) of a row of values in shared memory.
  template <class F>
  __device__ void each(const float* values, const F& f) const {
#pragma unroll
    for (int i = 0; i < kColumns; i += 4) {
      const float4 x = *reinterpret_cast<const float4*>(values + column(i));
      f(i, x.x);
      f(i + 1, x.y);
      f(i + 2, x.z);
      f(i + 3, x.w);
    }
  }

  __device__ static float over_row(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
  }

  // The sums over the warp's eight keys of factor * G, for each column.
  __device__ void put_column_sums(float factor, float* to) const {
    float x[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; i++) x[i] = g_[i] * factor;
    int index = 0, width = kColumns;
#pragma unroll
    for (int half = 16; half >= 4; half /= 2) {
      width /= 2;
      const bool upper = lane_ & half;
      index += upper ? width : 0;
#pragma unroll
      for (int i = 0; i < kColumns / 2; i++) {
        if (i >= width) break;
        const float give = upper ? x[i] : x[i + width], keep = upper ? x[i + width] : x[i];
        x[i] = keep + __shfl_xor_sync(~0u, give, half);
      }
    }
#pragma unroll
    for (int i = 0; i < kColumns / 8; i++) to[column(index + i)] = x[i];
  }

  // Step `local` of the chunk, t of the sequence. state_ is that after it, and becomes that before it.
  __device__ void retreat(int64_t t, int local) {
    const float* f = rows_ + local * kRows * kDim;
    const float r = f[kR * kDim + key_];
    float dr = 0, dk = 0, db = 0, dw = 0, da = 0;
    each(f + kDy * kDim, [&](int i, float dy) {
      dr = fmaf(state_[i], dy, dr);
      g_[i] = fmaf(r, dy, g_[i]);
    });
    load_state(local);
    put_column_sums(f[kK * kDim + key_], sums_ + warp_ * kDim);
    put_column_sums(f[kB * kDim + key_], sums_ + (kWarps<kDim> + warp_) * kDim);
    __syncthreads();
    if (threadIdx.x < 2 * kDim) {
      const int which = threadIdx.x / kDim, c = threadIdx.x % kDim;
      const float* x = sums_ + which * kWarps<kDim> * kDim + c;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps<kDim>; w++) sum += x[w * kDim];
      if (which == 1) ds_[c] = sum;
      if (which == 0 && c < s_.dim) at(a_.dv, t)[c] = from_float<T>(sum);
    }
    each(f + kV * kDim, [&](int i, float v) { dk = fmaf(g_[i], v, dk); });
    each(f + kS * kDim, [&](int i, float s) { db = fmaf(g_[i], s, db); });
    const float decay = f[kDecay * kDim + key_], a = f[kA * kDim + key_];
    __syncthreads();  // and before the next step's sums
    each(ds_, [&](int i, float ds) {
      dw = fmaf(g_[i], state_[i], dw);
      da = fmaf(state_[i], ds, da);
      g_[i] = fmaf(a, ds, g_[i] * decay);
    });
    dr = over_row(dr), dk = over_row(dk), db = over_row(db), dw = over_row(dw), da = over_row(da);
    if (key_ >= s_.dim) return;
    if (quarter_ == 0) {
      at(a_.dr, t)[key_] = from_float<T>(dr);
      at(a_.da, t)[key_] = from_float<T>(da);
    }
    if (quarter_ == 1) at(a_.dk, t)[key_] = from_float<T>(dk);
    if (quarter_ == 2) at(a_.db, t)[key_] = from_float<T>(db);
    if (quarter_ == 3) at(a_.dw, t)[key_] = from_float<T>(dw * decay);
  }

  const WkvBackwardArgs& a_;
  const WkvShape& s_;
  const int64_t place_, batch_, head_, length_, start_;
  float *const states_, *const rows_, *const sums_, *const ds_;
  const int lane_, warp_, quarter_, key_;
  float g_[kColumns], state_[kColumns];
};

template <class T, int kDim>
__global__ void __launch_bounds__(4 * kDim, 128 / kDim)
    backward(WkvBackwardArgs a, float* states, FaultRecord* record) {
  for (int64_t place = blockIdx.x; place < a.shape.batch * a.shape.heads; place += gridDim.x)
    Backward<T, kDim>(a, place, states + blockIdx.x * kStates<kDim>, record).run();
}

}  // namespace

void wkv_backward(const WkvBackwardArgs& a, const Work& work) {
  const WkvShape& s = a.shape;
  if (s.batch * s.heads == 0 || s.dim == 0) return;
  with_dtype(s.dtype, [&](auto* tag) {
    with_dim(s.dim, [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      constexpr int64_t kBytes = kStates<kDim> * sizeof(float);
      const int64_t blocks = std::min({s.batch * s.heads, kMostBlocks, kMostScratch / kBytes});
      const Scratch states(work, blocks * kBytes);
      launch(backward<std::remove_pointer_t<decltype(tag)>, kDim>, {blocks}, dim3(4 * kDim), kShared<kDim>, work, a,
             states.as<float>(), fault_record(work.device));
    });
  });
}

}  // namespace pyllm::cuda

// RWKV-7's recurrence, forward. Threads take heads of sequences, and blocks of a head's columns where there are few heads:
// the columns of a state do not depend on each other. A thread goes through its sequence in chunks of steps, whose factors
// it widens once and then uses for one block of columns after the other, so that both stay in the first-level cache.
//
// A step costs five multiply-adds an element of the state and one load and store of it: arithmetic is the floor. Two
// vectors of columns at a time keep the chains of sums just busy enough and leave registers for the broadcast factors.
#include <type_traits>

#include "cpu/kernels/wkv.h"

namespace pyllm::ISA {
namespace {

constexpr int64_t kWorth = 1 << 16;  // elements of state times steps that are worth a thread

// Columns first..last of the head; `factors` and `narrow` are scratch memory.
template <class T>
void run_head(const WkvArgs& a, int64_t batch, int64_t head, int64_t first, int64_t last, float* factors,
              float* narrow) {
  const WkvShape& s = a.shape;
  const int64_t dim = s.dim, length = length_of(s, batch), place = batch * s.heads + head;
  const int64_t chunks = s.time > 0 ? (s.time - 1) / kWkvChunk : 0;
  float* state = a.final_state + place * dim * dim;
  const float* in = s.state ? s.state + place * dim * dim : nullptr;
  if (!in || length == 0) {
    copy_state(in ? in + first : nullptr, dim, state + first, dim, dim, last - first);
    in = state;
  }
  const int64_t y_step = s.heads * dim;
  T* y = reinterpret_cast<T*>(a.y) + (batch * s.time * s.heads + head) * dim;
  for (int64_t t = 0; t < length; t += kWkvChunk) {
    const int64_t count = std::min(kWkvChunk, length - t);
    if (t > 0 && a.kept)
      copy_state(state + first, dim, a.kept + ((place * chunks + t / kWkvChunk - 1) * dim) * dim + first, dim, dim,
                 last - first);
    widen_factors<T>(s, batch, head, t, count, factors);
    for (int64_t c = first; c < last;) {
      const int64_t columns = last - c >= kWide * W ? kWide * W : std::min<int64_t>(W, last - c);
      Columns<T> part{dim,       count,
                      columns,   factors,
                      in + c,    dim,
                      state + c, dim,
                      0,         row_of<T>(s.v, batch, t, head) + c,
                      s.v.time,  y + t * y_step + c,
                      y_step,    nullptr,
                      0};
      if (columns == kWide * W) {
        run_columns<kWide, true>(part);
      } else if (columns == W) {
        run_columns<1, true>(part);
      } else {  // less than a vector: in rows of a vector, whose last lanes stay zero
        std::memset(narrow, 0, dim * W * sizeof(float));
        copy_state(in + c, dim, narrow, W, dim, columns);
        part.in = part.out = narrow;
        part.in_row = part.out_row = W;
        run_columns<1, true>(part);
        copy_state(narrow, W, state + c, dim, dim, columns);
      }
      c += columns;
    }
    in = state;
  }
  for (int64_t t = length; t < s.time; t++) std::memset(y + t * y_step + first, 0, (last - first) * sizeof(T));
}

template <class T>
void forward(const WkvArgs& a) {
  const WkvShape& s = a.shape;
  const int64_t heads = s.batch * s.heads, dim = s.dim;
  if (heads == 0 || dim == 0) return;
  const int64_t blocks = (dim + kWide * W - 1) / (kWide * W);
  const int64_t work = std::max<int64_t>(1, s.time) * dim * dim;
  int64_t splits = std::min<int64_t>(blocks, (4 * cpu::num_threads() + heads - 1) / heads);
  splits = heads * work < 2 * kWorth || cpu::num_threads() == 1 ? 1 : splits;
  parallel_for(heads * splits, std::max<int64_t>(1, kWorth * splits / work), [&](int64_t begin, int64_t end) {
    const int64_t floats = kWkvChunk * kFactors * dim;
    auto* factors = static_cast<float*>(cpu::scratch((floats + dim * W) * sizeof(float), 0));
    for (int64_t i = begin; i < end; i++) {
      const int64_t head = i / splits, part = i % splits;
      run_head<T>(a, head / s.heads, head % s.heads, part * blocks / splits * kWide * W,
                  std::min(dim, (part + 1) * blocks / splits * kWide * W), factors, factors + floats);
    }
  });
}

}  // namespace

void wkv_forward(const WkvArgs& a) {
  with_dtype(a.shape.dtype, [&](auto* tag) { forward<std::remove_pointer_t<decltype(tag)>>(a); });
}

}  // namespace pyllm::ISA

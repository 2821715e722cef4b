// RWKV-7's recurrence, backward. Threads take heads of sequences, and go through them from the end, chunk by chunk: from
// the state that the forward pass kept before a chunk, its states are made again, with the forward pass's own steps.
//
// With G the gradient of the state after a step (rows are keys, as the state's), what reached y included:
//     dk = G v    db = G s    dv = G' k    ds = G' b    dw = exp(w) * row sums of (G * S)    da = S ds
//     and for the step before, whose state S is: G <- diag(exp(w)) G + a ds + r dy, dr = S dy
// One walk over G and S does all of that, and sums the step before's dv and ds as it goes. Sums over keys stay in the
// lanes; those over values are kept as vectors, a row of the state each, and added across the lanes W rows at a time.
// That is ten multiply-adds an element, and four to make the state again. G and one state are all that a first-level
// cache has room for, so nothing else that is read or written with them is larger than a few rows.
#include <type_traits>

#include "cpu/kernels/wkv.h"

namespace pyllm::ISA {
namespace {

enum Sum { kDk, kDb, kDw, kDa, kDr, kSums };
enum Column { kV, kS, kDy, kDs, kDv, kColumns };  // what a step has for each value

template <class T>
class Backward {
 public:
  explicit Backward(const WkvBackwardArgs& a)
      : a_(a), s_(a.shape), dim_(s_.dim), row_(round_up(dim_, W)), state_(dim_ * row_), columns_(kColumns * row_) {
    float* at = static_cast<float*>(cpu::scratch(
        ((kWkvChunk + 2) * state_ + kWkvChunk * (2 * row_ + columns_ + kFactors * dim_)) * sizeof(float), 0));
    const auto take = [&](int64_t floats) {
      float* part = at;
      at += floats;
      return part;
    };
    states_ = take((kWkvChunk + 1) * state_);
    g_ = take(state_);
    v_ = take(kWkvChunk * row_);
    s_row_ = take(kWkvChunk * row_);
    of_steps_ = take(kWkvChunk * columns_);
    factors_ = take(kWkvChunk * kFactors * dim_);
  }

  void run(int64_t batch, int64_t head) {
    const int64_t length = length_of(s_, batch), place = (batch * s_.heads + head) * dim_ * dim_;
    const int64_t chunks = s_.time > 0 ? (s_.time - 1) / kWkvChunk : 0;
    start_ = (batch * s_.time * s_.heads + head) * dim_;
    for (char* gradient : {a_.dr, a_.dw, a_.dk, a_.dv, a_.da, a_.db})
      for (int64_t t = length; t < s_.time; t++) std::memset(at(gradient, t), 0, dim_ * sizeof(T));
    std::memset(g_, 0, state_ * sizeof(float));
    copy_state(a_.dfinal ? a_.dfinal + place : nullptr, dim_, g_, row_, dim_, dim_);
    for (int64_t first = (length - 1) / kWkvChunk * kWkvChunk; first >= 0 && length > 0; first -= kWkvChunk) {
      const float* before = s_.state ? s_.state + place : nullptr;
      if (first > 0) before = a_.kept + ((batch * s_.heads + head) * chunks + first / kWkvChunk - 1) * dim_ * dim_;
      std::memset(states_, 0, state_ * sizeof(float));
      copy_state(before, dim_, states_, row_, dim_, dim_);
      first_ = first;
      run_chunk(batch, head, std::min(kWkvChunk, length - first));
    }
    if (a_.dstate) copy_state(g_, row_, a_.dstate + place, dim_, dim_, dim_);
  }

 private:
  T* at(char* gradient, int64_t t) const { return reinterpret_cast<T*>(gradient) + start_ + t * s_.heads * dim_; }

  void run_chunk(int64_t batch, int64_t head, int64_t count) {
    widen_factors<T>(s_, batch, head, first_, count, factors_);
    for (int64_t t = 0; t < count; t++) {
      const T* v = row_of<T>(s_.v, batch, first_ + t, head);
      each(dim_, [&](int64_t i, int64_t n) { store(v_ + t * row_ + i, get(v + i, n)); });
    }
    for (int64_t c = 0; c < row_;) {
      const int64_t columns = row_ - c >= kWide * W ? kWide * W : W;
      const Columns<float> part{dim_,   count, columns, factors_, states_ + c, row_, states_ + state_ + c, row_, state_,
                                v_ + c, row_,  nullptr, 0,        s_row_ + c,  row_};
      columns == W ? run_columns<1, false>(part) : run_columns<kWide, false>(part);
      c += columns;
    }
    for (int64_t t = 0; t < count; t++) {
      const T* dy = row_of<T>(a_.dy, batch, first_ + t, head);
      float* out = of_steps_ + t * columns_;
      each(dim_, [&](int64_t i, int64_t n) {
        store(out + kV * W, load(v_ + t * row_ + i));
        store(out + kS * W, load(s_row_ + t * row_ + i));
        store(out + kDy * W, get(dy + i, n));
        store(out + kDs * W, V{});
        store(out + kDv * W, V{});
        out += kColumns * W;
      });
    }
    enter(count - 1);
    for (int64_t t = count - 1; t >= 0; t--) {
      const float* done = of_steps_ + t * columns_ + kDv * W;
      T* dv = at(a_.dv, first_ + t);
      each(dim_, [&](int64_t i, int64_t n) { write(dv + i, load(done + i * kColumns), n); });
      t > 0 ? leave<true>(t) : leave<false>(t);
    }
  }

  // G takes in the dy of a chunk's last step; that step's dv, ds and dr.
  void enter(int64_t t) {
    const float *f = factors_ + t * kFactors * dim_, *state = states_ + (t + 1) * state_;
    each(dim_, [&](int64_t first, int64_t n) {
      V parts[W] = {};
      for (int64_t i = 0; i < n; i++) {
        const int64_t j = first + i;
        const V r = set(f[kR * dim_ + j]), k = set(f[kK * dim_ + j]), b = set(f[kB * dim_ + j]);
        float* own = of_steps_ + t * columns_;
        for (int64_t c = 0; c < row_; c += W, own += kColumns * W) {
          const V dy = load(own + kDy * W), g = fma(r, dy, load(g_ + j * row_ + c));
          store(g_ + j * row_ + c, g);
          store(own + kDv * W, fma(g, k, load(own + kDv * W)));
          store(own + kDs * W, fma(g, b, load(own + kDs * W)));
          parts[i] = fma(load(state + j * row_ + c), dy, parts[i]);
        }
      }
      write_sums(at(a_.dr, first_ + t) + first, parts, nullptr, n);
    });
  }

  // From the state after step t to the one before, whose own step's dy is taken in where there is one in this chunk.
  template <bool kNext>
  void leave(int64_t t) {
    T *dk = at(a_.dk, first_ + t), *db = at(a_.db, first_ + t), *dw = at(a_.dw, first_ + t);
    T *da = at(a_.da, first_ + t), *dr = kNext ? at(a_.dr, first_ + t - 1) : nullptr;
    const float* decay = factors_ + (t * kFactors + kDecay) * dim_;
    each(dim_, [&](int64_t j, int64_t n) {
      V parts[kSums][W];
      int64_t i = 0;
      for (; i + 2 <= n; i += 2) leave_rows<2, kNext>(t, j + i, parts[0] + i);
      if (i < n) {
        leave_rows<1, kNext>(t, j + i, parts[0] + i);
        i++;
      }
      for (; i < W; i++)
        for (auto& part : parts) part[i] = V{};
      write_sums(dk + j, parts[kDk], nullptr, n);
      write_sums(db + j, parts[kDb], nullptr, n);
      write_sums(da + j, parts[kDa], nullptr, n);
      write_sums(dw + j, parts[kDw], decay + j, n);
      if (kNext) write_sums(dr + j, parts[kDr], nullptr, n);
    });
  }

  __attribute__((noinline)) static void write_sums(T* out, V* rows, const float* factor, int64_t n) {
    const V total = sums(rows);
    write(out, factor ? total * get(factor, n) : total, n);
  }

  template <int R, bool kNext>
  VEC void leave_rows(int64_t t, int64_t j, V* parts) const {
    const float *f = factors_ + t * kFactors * dim_ + j, *before = f - kFactors * dim_;
    const float *own = of_steps_ + t * columns_, *state = states_ + t * state_ + j * row_;
    float *next = of_steps_ + (t - 1) * columns_, *g = g_ + j * row_;
    const int64_t row = row_;
    V dk[R] = {}, db[R] = {}, dw[R] = {}, da[R] = {}, dr[R] = {}, decay[R], a[R], r[R], k[R], b[R];
    for (int i = 0; i < R; i++) {
      decay[i] = set(f[kDecay * dim_ + i]);
      a[i] = set(f[kA * dim_ + i]);
      r[i] = kNext ? set(before[kR * dim_ + i]) : V{};
      k[i] = kNext ? set(before[kK * dim_ + i]) : V{};
      b[i] = kNext ? set(before[kB * dim_ + i]) : V{};
    }
    for (const float* end = g + row; g < end; g += W, state += W, own += kColumns * W, next += kColumns * W) {
      const V v = load(own + kV * W), s = load(own + kS * W), ds = load(own + kDs * W);
      V dy{}, dv{}, next_ds{};
      if (kNext) {
        dy = load(next + kDy * W);
        dv = load(next + kDv * W);
        next_ds = load(next + kDs * W);
      }
      UNROLL for (int i = 0; i < R; i++) {
        V x = load(g + i * row);
        const V z = load(state + i * row);
        dk[i] = fma(x, v, dk[i]);
        db[i] = fma(x, s, db[i]);
        dw[i] = fma(x, z, dw[i]);
        da[i] = fma(z, ds, da[i]);
        x = fma(a[i], ds, x * decay[i]);
        if (kNext) {
          dr[i] = fma(z, dy, dr[i]);
          x = fma(r[i], dy, x);
          dv = fma(x, k[i], dv);
          next_ds = fma(x, b[i], next_ds);
        }
        store(g + i * row, x);
      }
      if (kNext) {
        store(next + kDv * W, dv);
        store(next + kDs * W, next_ds);
      }
    }
    for (int i = 0; i < R; i++) {
      parts[kDk * W + i] = dk[i];
      parts[kDb * W + i] = db[i];
      parts[kDw * W + i] = dw[i];
      parts[kDa * W + i] = da[i];
      parts[kDr * W + i] = dr[i];
    }
  }

  const WkvBackwardArgs& a_;
  const WkvShape& s_;
  const int64_t dim_, row_, state_, columns_;
  int64_t start_ = 0, first_ = 0;  // where a head's elements begin; the chunk's first step
  float *states_, *g_, *v_, *s_row_, *of_steps_, *factors_;
};

template <class T>
void backward(const WkvBackwardArgs& a) {
  const WkvShape& s = a.shape;
  if (s.batch * s.heads == 0 || s.dim == 0) return;
  parallel_for(s.batch * s.heads, 1, [&](int64_t begin, int64_t end) {
    Backward<T> pass(a);
    for (int64_t i = begin; i < end; i++) pass.run(i / s.heads, i % s.heads);
  });
}

}  // namespace

void wkv_backward(const WkvBackwardArgs& a) {
  with_dtype(a.shape.dtype, [&](auto* tag) { backward<std::remove_pointer_t<decltype(tag)>>(a); });
}

}  // namespace pyllm::ISA

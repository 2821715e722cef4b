// A recurrent layer, backward. Chunk after chunk of steps, from the last one taken: the time loop turns dy and the
// gradient carried from the step after into gradients of the gates' sums (dgates) and carries dgates w_hh on; then the
// chunk's dgates, while they are in the cache, give dx, and are added to the gradients of weights and biases in products
// over all rows of the chunk, on the tile registers where those pay. Nothing is recomputed. A chunk's size depends on the
// batch alone, so that the weights' gradients do not depend on threads.
#include "cpu/kernels/recurrent.h"

#include "cpu/kernels/gemm_parts.h"

namespace pyllm::ISA {
namespace {

template <Recurrence kKind, class T>
class Backward {
  static constexpr int64_t kGates = gates_of(kKind);
  static constexpr bool kGru = kKind == Recurrence::gru, kLstm = kKind == Recurrence::lstm;
  static constexpr bool kNarrow = sizeof(T) != sizeof(float);

 public:
  explicit Backward(const RecurrentBackwardArgs& args)
      : a_(args),
        s_(args.shape),
        hidden_(s_.hidden),
        batch_(s_.batch),
        width_(kGates * hidden_),
        step_(row_floats(hidden_)),
        gate_step_(row_floats(width_)),
        units_((hidden_ + kPanel - 1) / kPanel),
        chunk_(std::clamp<int64_t>(512 / std::max<int64_t>(1, batch_), 1, std::max<int64_t>(1, s_.time))) {
    const int64_t blocks[] = {batch_ * step_,
                              kLstm ? batch_ * step_ : 0,
                              batch_ * gate_step_,
                              batch_ * gate_step_,
                              chunk_ * batch_ * width_,
                              kGru ? chunk_ * batch_ * width_ : 0,
                              starts() ? batch_ * width_ : 0,
                              packed_size(hidden_, width_),
                              a_.dx ? packed_size(s_.inputs, width_) : 0,
                              kNarrow && a_.dw_ih ? width_ * s_.inputs : 0,
                              kNarrow && a_.dw_hh ? width_ * hidden_ : 0,
                              width_,
                              width_};
    float** const names[] = {&dh_,   &dc_,   &d_[0],  &d_[1],  &dgates_, &dhidden_, &first_,
                             &w_hh_, &w_ih_, &dw_ih_, &dw_hh_, &db_ih_,  &db_hh_};
    int64_t total = 0;
    for (const int64_t n : blocks) total += round_up(n, 16);
    auto* memory = static_cast<float*>(cpu::scratch(total * sizeof(float) + 64, 0));
    for (int i = 0; i < 13; memory += round_up(blocks[i++], 16)) *names[i] = memory;
    if (!kGru) dhidden_ = dgates_;
    if (!kNarrow && a_.dw_ih) dw_ih_ = at<float>(a_.dw_ih, 0);
    if (!kNarrow && a_.dw_hh) dw_hh_ = at<float>(a_.dw_hh, 0);
  }

  void run() {
    load_state<T>(s_, {a_.dh_n, hidden_, 1}, dh_, step_);
    if (kLstm) load_state<T>(s_, {a_.dc_n, hidden_, 1}, dc_, step_);
    if (starts()) std::fill(first_, first_ + batch_ * width_, 0.0f);
    std::fill(db_ih_, db_ih_ + width_, 0.0f);
    std::fill(db_hh_, db_hh_ + width_, 0.0f);
    if (a_.dw_ih) std::fill(dw_ih_, dw_ih_ + width_ * s_.inputs, 0.0f);
    if (a_.dw_hh) std::fill(dw_hh_, dw_hh_ + width_ * hidden_, 0.0f);
    pack({s_.w_hh.data, s_.dtype, s_.w_hh.row, s_.w_hh.column}, hidden_, width_, w_hh_);
    const bool packs = a_.dx && !parts_pay(input_product(0, chunk_, nullptr));
    if (packs) pack({s_.w_ih.data, s_.dtype, s_.w_ih.row, s_.w_ih.column}, s_.inputs, width_, w_ih_);
    for (int64_t done = 0; done < s_.time; done += chunk_) {
      const int64_t count = std::min(chunk_, s_.time - done);
      const int64_t first = s_.reverse ? done : s_.time - done - count;  // the forward pass's last steps come first
      const int64_t weight = width_ * hidden_;
      together(team_for(batch_, weight), [&](cpu::Team& team, int rank) {
        const Share share = share_of(batch_, hidden_, weight, team.size(), rank);
        const bool meets = !splits_rows(batch_, weight, team.size());
        for (int64_t i = 0; i < count; i++) {
          const int64_t t = s_.reverse ? first + i : first + count - 1 - i;
          const int64_t rows = std::min(share.row1, live_rows(s_, t)) - share.row0;
          float* d = d_[i % 2];
          for (int64_t unit = share.unit0; unit < share.unit1; unit++) retreat(t, first, share, rows, unit, d);
          if (meets) team.barrier();
          if (rows > 0)
            step_product(d + share.row0 * gate_step_, gate_step_, rows, w_hh_ + share.unit0 * kPanel * width_, width_,
                         share.unit1 - share.unit0, dh_ + share.row0 * step_ + share.unit0 * kPanel, step_, kPanel,
                         kGru);
        }
      });
      if (a_.dx) gradient_product(input_product(first, count, packs ? w_ih_ : nullptr));
      add_weight_gradients(first, count);
    }
    if (starts()) add_state_weight_gradients(batch_, first_, {s_.h0.data, s_.dtype, s_.h0.row, s_.h0.column});
    if (kNarrow && a_.dw_ih) copy(dw_ih_, width_ * s_.inputs, a_.dw_ih);
    if (kNarrow && a_.dw_hh) copy(dw_hh_, width_ * hidden_, a_.dw_hh);
    if (a_.db_ih) copy(db_ih_, width_, a_.db_ih);
    if (a_.db_hh) copy(db_hh_, width_, a_.db_hh);
    for (int64_t r = 0; r < batch_; r++) {
      const int64_t b = sequence_of(s_, r);
      if (a_.dh0) copy(dh_ + r * step_, hidden_, reinterpret_cast<char*>(at<T>(a_.dh0, b * hidden_)));
      if (kLstm && a_.dc0) copy(dc_ + r * step_, hidden_, reinterpret_cast<char*>(at<T>(a_.dc0, b * hidden_)));
    }
  }

 private:
  bool starts() const { return a_.dw_hh && s_.h0.data; }  // what the first steps' dgates, by sequence, are kept for

  // The gradient of x, of `count` steps.
  Product input_product(int64_t first, int64_t count, const float* packed) const {
    return {count * batch_,
            s_.inputs,
            width_,
            rows_of(dgates_),
            {s_.w_ih.data, s_.dtype, s_.w_ih.row, s_.w_ih.column},
            packed,
            nullptr,
            a_.dx + first * batch_ * s_.inputs * size_of(a_.dx_dtype),
            a_.dx_dtype,
            s_.inputs,
            a_.add_dx};
  }

  Matrix rows_of(const float* dgates) const { return {dgates, DType::f32, width_, 1}; }
  static Matrix transposed(const Matrix& m) { return {m.data, m.dtype, m.column_step, m.row_step}; }

  static void copy(const float* from, int64_t count, char* to) {
    T* out = at<T>(to, 0);
    for (int64_t i = 0; i < count; i += W) {
      const int64_t n = std::min<int64_t>(W, count - i);
      write(out + i, get(from + i, n), n);
    }
  }

  // Step t's dgates for one unit and the share's rows, of which the first `live` take part; d: the same, by row.
  // dh_ becomes the part of the carried gradient that does not pass through w_hh (gru), dc_ that of the cell.
  void retreat(int64_t t, int64_t chunk_first, const Share& share, int64_t live, int64_t unit, float* d) const {
    for (int64_t r = share.row0; r < share.row1; r++) {
      const int64_t b = sequence_of(s_, r), row = t * batch_ + b;
      const bool start = s_.reverse ? t + 1 == length_of(s_, b) : t == 0;
      const int64_t before = row + (s_.reverse ? batch_ : -batch_);  // the step that the state came from
      float* chunk = dgates_ + (row - chunk_first * batch_) * width_;
      float* hidden_chunk = dhidden_ + (row - chunk_first * batch_) * width_;
      for (int64_t half = 0; half < 2; half++) {
        const int64_t j = unit * kPanel + half * W, n = std::min<int64_t>(W, hidden_ - j);
        if (n <= 0) break;
        const auto gate = [&](int64_t i) { return get(a_.kept.gates + row * width_ + i * hidden_ + j, n); };
        const auto put_gate = [&](int64_t i, V v, V hidden_v) {
          write(chunk + i * hidden_ + j, v, n);
          if (kGru) write(hidden_chunk + i * hidden_ + j, hidden_v, n);
          write(d + r * gate_step_ + i * hidden_ + j, hidden_v, n);
          if (start && starts()) write(first_ + b * width_ + i * hidden_ + j, hidden_v, n);
        };
        if (r - share.row0 >= live) {
          for (int64_t i = 0; i < kGates; i++) {
            write(chunk + i * hidden_ + j, V{}, n);
            if (kGru) write(hidden_chunk + i * hidden_ + j, V{}, n);
          }
          continue;
        }
        float* carried = dh_ + r * step_ + j;
        V dh = get(carried, n);
        if (a_.dy) dh = dh + get(at<T>(a_.dy, t * a_.dy_time + b * a_.dy_batch + j), n);
        if constexpr (kLstm) {
          const V input = gate(0), forget = gate(1), fresh = gate(2), output = gate(3);
          const V squashed = get(a_.kept.tanh_cell + row * hidden_ + j, n);
          float* dcell = dc_ + r * step_ + j;
          const V dc = fma(dh * output, 1.0f - squashed * squashed, get(dcell, n));
          const V cell = state(s_.c0, start, b, j, n, at<T>(a_.kept.cell, before * hidden_ + j));
          write(dcell, dc * forget, n);
          const V di = dc * fresh * input * (1.0f - input), df = dc * cell * forget * (1.0f - forget);
          const V dg = dc * input * (1.0f - fresh * fresh), dout = dh * squashed * output * (1.0f - output);
          put_gate(0, di, di);
          put_gate(1, df, df);
          put_gate(2, dg, dg);
          put_gate(3, dout, dout);
        } else if constexpr (kGru) {
          const V reset = gate(0), update = gate(1), fresh = gate(2);
          const V hidden = get(a_.kept.new_hidden + row * hidden_ + j, n);
          const V h = state(s_.h0, start, b, j, n, at<T>(a_.y, before * a_.y_step + j));
          const V dnew = dh * (1.0f - update) * (1.0f - fresh * fresh);
          const V dreset = dnew * hidden * reset * (1.0f - reset);
          const V dupdate = dh * (h - fresh) * update * (1.0f - update);
          write(carried, dh * update, n);
          put_gate(0, dreset, dreset);
          put_gate(1, dupdate, dupdate);
          put_gate(2, dnew, dnew * reset);
        } else {
          const V y = gate(0);
          const V dsum = kKind == Recurrence::rnn_tanh ? dh * (1.0f - y * y) : select(y > 0.0f, dh, V{});
          put_gate(0, dsum, dsum);
        }
      }
    }
  }

  // Columns of the state before a step: the initial state's at a sequence's start, else `before`.
  V state(const StridedMatrix& initial, bool start, int64_t b, int64_t j, int64_t n, const T* before) const {
    if (!start) return get(before, n);
    if (!initial.data) return V{};
    const T* source = at<T>(initial.data, b * initial.row + j * initial.column);
    if (initial.column == 1) return get(source, n);
    V v{};
    for (int64_t i = 0; i < n; i++) v[i] = to_float(source[i * initial.column]);
    return v;
  }

  void add_weight_gradients(int64_t first, int64_t count) {
    if (a_.dw_ih)
      gradient_product({width_,
                        s_.inputs,
                        count * batch_,
                        transposed(rows_of(dgates_)),
                        {at<T>(s_.x.data, first * batch_ * s_.x.row), s_.dtype, s_.x.row, s_.x.column},
                        nullptr,
                        nullptr,
                        dw_ih_,
                        DType::f32,
                        s_.inputs,
                        true});
    // The hidden state before a step is y's of the step before; what came from h0 is added at the end.
    const int64_t from = !s_.reverse && first == 0 ? 1 : 0;
    const int64_t to = s_.reverse && first + count == s_.time ? count - 1 : count;
    if (a_.dw_hh && to > from) {
      const T* before = at<T>(a_.y, (first + from + (s_.reverse ? 1 : -1)) * batch_ * a_.y_step);
      add_state_weight_gradients((to - from) * batch_, dhidden_ + from * batch_ * width_,
                                 {before, s_.dtype, a_.y_step, 1});
    }
    if (a_.db_ih) add_column_sums(dgates_, count * batch_, db_ih_);
    if (a_.db_hh) add_column_sums(dhidden_, count * batch_, db_hh_);
  }

  // Of `rows` rows of dgates, and the states before them.
  void add_state_weight_gradients(int64_t rows, const float* dgates, const Matrix& states) const {
    gradient_product({width_, hidden_, rows, transposed(rows_of(dgates)), states, nullptr, nullptr, dw_hh_, DType::f32,
                      hidden_, true});
  }

  void add_column_sums(const float* dgates, int64_t rows, float* sums) const {
    constexpr int64_t kWide = 4 * W;
    parallel_for((width_ + kWide - 1) / kWide, 1 + 16384 / (rows * kWide + 1), [&](int64_t begin, int64_t end) {
      for (int64_t j = begin * kWide; j < std::min(end * kWide, width_); j += kWide) {
        V total[4] = {};
        const auto each = [&](const auto& f) {
          for (int64_t v = 0; v < 4 && j + v * W < width_; v++)
            f(v, j + v * W, std::min<int64_t>(W, width_ - j - v * W));
        };
        for (int64_t i = 0; i < rows; i++)
          each([&](int64_t v, int64_t column, int64_t n) {
            total[v] = total[v] + get(dgates + i * width_ + column, n);
          });
        each([&](int64_t v, int64_t column, int64_t n) { write(sums + column, get(sums + column, n) + total[v], n); });
      }
    });
  }

  const RecurrentBackwardArgs& a_;
  const RecurrentShape& s_;
  const int64_t hidden_, batch_, width_, step_, gate_step_, units_, chunk_;
  float *dh_, *dc_, *d_[2], *dgates_, *dhidden_, *first_, *w_hh_, *w_ih_, *dw_ih_, *dw_hh_, *db_ih_, *db_hh_;
};

}  // namespace

void recurrent_backward(const RecurrentBackwardArgs& a) {
  with_dtype(a.shape.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    switch (a.shape.kind) {
      case Recurrence::rnn_tanh:
        return Backward<Recurrence::rnn_tanh, T>(a).run();
      case Recurrence::rnn_relu:
        return Backward<Recurrence::rnn_relu, T>(a).run();
      case Recurrence::gru:
        return Backward<Recurrence::gru, T>(a).run();
      case Recurrence::lstm:
        return Backward<Recurrence::lstm, T>(a).run();
    }
  });
}

}  // namespace pyllm::ISA

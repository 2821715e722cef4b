// A recurrent layer, forward. The products of the inputs with w_ih are one product over the rows of as many steps as
// fill a cache (a chunk); then those steps run with their gates' nonlinearities fused to the product with w_hh. How a
// step is shared out is told in recurrent.h. States are rounded to the storage type at each step, so that feeding a
// sequence in pieces, or cell by cell, carries what is carried here.
//
// A call of one step, as of a cell, packs nothing: both products go straight through gemm.h. Weights that are quantised
// are packed already: their products are those of quantized_linear, of a step's live rows with w_hh, and then threads
// share out the units for the gates.
#include "cpu/kernels/recurrent.h"

#include "cpu/kernels/functions.h"
#include "cpu/quantized_linear.h"

namespace pyllm::ISA {
namespace {

template <Recurrence kKind, class T>
class Forward {
  static constexpr int64_t kGates = gates_of(kKind);
  static constexpr bool kGru = kKind == Recurrence::gru, kLstm = kKind == Recurrence::lstm;
  static constexpr int64_t kUnitRows = 64;  // rows of units whose gates are worth a thread
  static constexpr int kSlot = 4;           // of scratch memory that quantized_linear leaves alone

 public:
  explicit Forward(const RecurrentArgs& args)
      : a_(args),
        s_(args.shape),
        hidden_(s_.hidden),
        batch_(s_.batch),
        width_(kGates * hidden_),
        step_(row_floats(hidden_)),
        units_((hidden_ + kPanel - 1) / kPanel),
        chunk_(std::clamp<int64_t>(512 / std::max<int64_t>(1, batch_), 1, std::max<int64_t>(1, s_.time))),
        alone_(s_.time == 1),
        memory_(static_cast<float*>(cpu::scratch(floats() * sizeof(float), kSlot))) {
    h_[0] = take(batch_ * step_);
    h_[1] = take(batch_ * step_);
    c_ = take(kLstm ? batch_ * step_ : 0);
    bias_ = take(width_ + W);
    new_bias_ = take(kGru ? hidden_ + W : 0);
    gates_ = take(a_.keep.gates ? 0 : chunk_ * batch_ * width_);
    sums_ = take(alone_ || quantized(a_.packed_hh) ? batch_ * width_ : 0);
    x_ = take(quantized(a_.packed_ih) ? chunk_ * batch_ * s_.inputs : 0);
    w_ih_ = take(packs(a_.packed_ih) ? packed_size(width_, s_.inputs) : 0);
    w_hh_ = take(packs(a_.packed_hh) ? units_ * kGates * kPanel * hidden_ : 0);
  }

  void run() {
    load_state<T>(s_, s_.h0, h_[0], step_);
    if (!alone_) std::copy(h_[0], h_[0] + batch_ * step_, h_[1]);
    if (kLstm) load_state<T>(s_, s_.c0, c_, step_);
    load_bias();
    for (int64_t r = live_rows(s_, 0); r < batch_; r++) keep_initial_state(r);
    if (alone_ && !quantized(a_.packed_ih) && !quantized(a_.packed_hh)) return run_alone();
    const Matrix input = {s_.w_ih.data, s_.dtype, s_.w_ih.column, s_.w_ih.row};  // transposed
    if (packs(a_.packed_ih)) pack(input, width_, s_.inputs, w_ih_);
    if (packs(a_.packed_hh)) pack_recurrent();
    for (int64_t done = 0; done < s_.time; done += chunk_) {
      const int64_t count = std::min(chunk_, s_.time - done);
      const int64_t first = s_.reverse ? s_.time - done - count : done;
      project(input, first, count);
      const auto time_of = [&](int64_t i) { return s_.reverse ? first + count - 1 - i : first + i; };
      if (!packs(a_.packed_hh)) {
        awake([&] {
          for (int64_t i = 0; i < count; i++) step_from_sums(time_of(i), first, done + i);
        });
        continue;
      }
      together(team_for(batch_, kGates * hidden_ * hidden_), [&](cpu::Team& team, int rank) {
        for (int64_t i = 0; i < count; i++) {
          step(time_of(i), first, done + i, team, rank);
          if (!splits_rows(batch_, kGates * hidden_ * hidden_, team.size())) team.barrier();
        }
      });
    }
  }

 private:
  float* take(int64_t floats) {
    float* block = memory_ + taken_;
    taken_ += round_up(floats, 16);
    return block;
  }
  static bool quantized(const PackedMatrix& w) { return w.weight.bits > 0; }
  bool packs(const PackedMatrix& w) const { return !alone_ && !quantized(w); }
  int64_t floats() const {
    const int64_t weights = (packs(a_.packed_ih) ? packed_size(width_, s_.inputs) : chunk_ * batch_ * s_.inputs) +
                            (packs(a_.packed_hh) ? units_ * kGates * kPanel * hidden_ : batch_ * width_);
    return 3 * batch_ * step_ + (a_.keep.gates ? 0 : chunk_ * batch_ * width_) + width_ + hidden_ + weights + 16 * 16;
  }

  // The biases of a gate are summed, but for the new gate of a gru, whose hidden part is scaled by the reset gate.
  void load_bias() {
    const auto add = [&](const StridedMatrix& bias, int64_t from, int64_t count, float* out) {
      if (!bias.data) return;
      with_dtype(s_.dtype, [&](auto* tag) {
        const auto* source = reinterpret_cast<decltype(tag)>(const_cast<char*>(bias.data)) + from * bias.column;
        int64_t j = 0;
        if (bias.column == 1)
          for (; j + W <= count; j += W) store(out + j, load(out + j) + load(source + j));
        for (; j < count; j++) out[j] += to_float(source[j * bias.column]);
      });
    };
    std::fill(bias_, bias_ + width_, 0.0f);
    add(a_.b_ih, 0, width_, bias_);
    add(a_.b_hh, 0, kGru ? 2 * hidden_ : width_, bias_);
    if (!kGru) return;
    std::fill(new_bias_, new_bias_ + hidden_, 0.0f);
    add(a_.b_hh, 2 * hidden_, hidden_, new_bias_);
  }

  void pack_recurrent() {
    parallel_for(units_ * kGates, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++) {
        const int64_t unit = p / kGates, gate = p % kGates, column = unit * kPanel;
        const T* corner = at<T>(s_.w_hh.data, (gate * hidden_ + column) * s_.w_hh.row);
        pack({corner, s_.dtype, s_.w_hh.column, s_.w_hh.row}, std::min(kPanel, hidden_ - column), hidden_,
             w_hh_ + p * kPanel * hidden_);
      }
    });
  }

  float* gates_at(int64_t t, int64_t chunk_first) const {
    return a_.keep.gates ? a_.keep.gates + t * batch_ * width_ : gates_ + (t - chunk_first) * batch_ * width_;
  }

  void project(const Matrix& input, int64_t first, int64_t count) {
    const T* source = at<T>(s_.x.data, first * batch_ * s_.x.row);
    float* gates = gates_at(first, first);
    if (!quantized(a_.packed_ih)) {
      const Matrix x = {source, s_.dtype, s_.x.row, s_.x.column};
      return product({count * batch_, width_, s_.inputs, x, input, alone_ ? nullptr : w_ih_, bias_, gates, DType::f32,
                      width_, false, nullptr, alone_});
    }
    const int64_t rows = count * batch_;
    if constexpr (std::is_same_v<T, float>)
      if (s_.x.column == 1) return quantized_product(a_.packed_ih, rows, s_.inputs, source, s_.x.row, bias_, gates);
    parallel_for(rows, std::max<int64_t>(1, 8192 / (s_.inputs + 1)), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        const T* row = source + r * s_.x.row;
        float* to = x_ + r * s_.inputs;
        int64_t j = 0;
        if (s_.x.column == 1)
          for (; j + W <= s_.inputs; j += W) store(to + j, load(row + j));
        for (; j < s_.inputs; j++) to[j] = to_float(row[j * s_.x.column]);
      }
    });
    quantized_product(a_.packed_ih, rows, s_.inputs, x_, s_.inputs, bias_, gates);
  }

  // rows of a, a_row floats apart, by a weight, to c (rows x width).
  void quantized_product(const PackedMatrix& w, int64_t rows, int64_t k, const float* a, int64_t a_row,
                         const float* bias, float* c) const {
    const auto bytes = [](const float* p) { return reinterpret_cast<const char*>(p); };
    quantized_linear(
        {w.weight, rows, k, a_row, bytes(a), w.panels, bytes(bias), reinterpret_cast<char*>(c), DType::f32});
  }

  // A step whose products with w_hh need no team that stays together: those of its live rows, then its units.
  void step_from_sums(int64_t t, int64_t chunk_first, int64_t index) {
    const int64_t live = live_rows(s_, t);
    const float* h = h_[index % 2];
    if (quantized(a_.packed_hh)) {
      quantized_product(a_.packed_hh, live, hidden_, h, step_, nullptr, sums_);
    } else {
      const Matrix states = {h, DType::f32, step_, 1}, w_hh = {s_.w_hh.data, s_.dtype, s_.w_hh.column, s_.w_hh.row};
      product({live, width_, hidden_, states, w_hh, nullptr, nullptr, sums_, DType::f32, width_, false});
    }
    parallel_for(
        units_, std::max<int64_t>(1, kUnitRows / std::max<int64_t>(1, batch_)), [&](int64_t begin, int64_t end) {
          for (int64_t unit = begin; unit < end; unit++)
            advance(t, gates_at(t, chunk_first), index, 0, batch_, live, unit, sums_ + unit * kPanel, hidden_, width_);
        });
  }

  // One step: a thread needs no other's columns.
  void run_alone() {
    float* gates = gates_at(0, 0);
    together(team_for(batch_, width_ * (hidden_ + s_.inputs)), [&](cpu::Team& team, int rank) {
      const int64_t begin = rank * units_ / team.size(), end = (rank + 1) * units_ / team.size();
      const int64_t columns = std::min(end * kPanel, hidden_) - begin * kPanel;
      for (int64_t gate = 0; gate < kGates && begin < end; gate++) {
        const int64_t n = gate * hidden_ + begin * kPanel;
        const Matrix x = {s_.x.data, s_.dtype, s_.x.row, s_.x.column}, h = {h_[0], DType::f32, step_, 1};
        const Matrix w_ih = {at<T>(s_.w_ih.data, n * s_.w_ih.row), s_.dtype, s_.w_ih.column, s_.w_ih.row};
        const Matrix w_hh = {at<T>(s_.w_hh.data, n * s_.w_hh.row), s_.dtype, s_.w_hh.column, s_.w_hh.row};
        product({batch_, columns, s_.inputs, x, w_ih, nullptr, bias_ + n, gates + n, DType::f32, width_, false, nullptr,
                 true});
        product({batch_, columns, hidden_, h, w_hh, nullptr, nullptr, sums_ + n, DType::f32, width_, false});
      }
      for (int64_t unit = begin; unit < end; unit++)
        advance(0, gates, 0, 0, batch_, live_rows(s_, 0), unit, sums_ + unit * kPanel, hidden_, width_);
    });
  }

  void step(int64_t t, int64_t chunk_first, int64_t index, const cpu::Team& team, int rank) {
    const Share share = share_of(batch_, hidden_, kGates * hidden_ * hidden_, team.size(), rank);
    const int64_t live = live_rows(s_, t), rows = std::min(share.row1, live) - share.row0;
    // One or two rows take all of the thread's units at once, more take one at a time.
    const int64_t group = rows <= 2 ? share.unit1 - share.unit0 : 1, per_panel = std::max<int64_t>(rows, 0) * kPanel;
    auto* sums = static_cast<float*>(cpu::scratch(group * kGates * per_panel * sizeof(float) + 64, 1));
    for (int64_t unit = share.unit0; unit < share.unit1; unit += group) {
      if (rows > 0)
        step_product(h_[index % 2] + share.row0 * step_, step_, rows, w_hh_ + unit * kGates * kPanel * hidden_, hidden_,
                     group * kGates, sums, kPanel, per_panel, false);
      for (int64_t u = 0; u < group; u++)
        advance(t, gates_at(t, chunk_first), index, share.row0, share.row1, live, unit + u,
                sums + u * kGates * per_panel, per_panel, kPanel);
    }
  }

  // Step t of rows row0..row1, of which those from `live` on are over, for one unit. sums: the products with w_hh, of the
  // gates gate_step and the rows row_step apart.
  void advance(int64_t t, float* gates, int64_t index, int64_t row0, int64_t row1, int64_t live, int64_t unit,
               const float* sums, int64_t gate_step, int64_t row_step) const {
    const float* h = h_[index % 2];
    float* next = h_[(index + 1) % 2];
    for (int64_t r = row0; r < row1; r++, sums += row_step) {
      const int64_t b = sequence_of(s_, r), row = t * batch_ + b;
      const bool last = s_.reverse ? t == 0 : t + 1 == length_of(s_, b);
      for (int64_t half = 0; half < 2; half++) {
        const int64_t j = unit * kPanel + half * W, n = std::min<int64_t>(W, hidden_ - j);
        if (n <= 0) break;
        if (r >= live) {
          if (a_.y) write(at<T>(a_.y, row * a_.y_step + j), V{}, n);
          continue;
        }
        float* g = gates + b * width_ + j;
        const float* sum = sums + half * W;
        const auto gate = [&](int64_t i) { return get(g + i * hidden_, n) + get(sum + i * gate_step, n); };
        V out;
        if constexpr (kLstm) {
          const V input = sigmoid(gate(0)), forget = sigmoid(gate(1)), fresh = tanh(gate(2)), output = sigmoid(gate(3));
          const V cell = rounded<T>(fma(forget, get(c_ + r * step_ + j, n), input * fresh)), squashed = tanh(cell);
          out = output * squashed;
          write(c_ + r * step_ + j, cell, n);
          if (last) write(at<T>(a_.c_n, b * hidden_ + j), cell, n);
          if (a_.keep.gates) {
            write(g, input, n);
            write(g + hidden_, forget, n);
            write(g + 2 * hidden_, fresh, n);
            write(g + 3 * hidden_, output, n);
            write(a_.keep.tanh_cell + row * hidden_ + j, squashed, n);
            write(at<T>(a_.keep.cell, row * hidden_ + j), cell, n);
          }
        } else if constexpr (kGru) {
          const V reset = sigmoid(gate(0)), update = sigmoid(gate(1));
          const V hidden = get(sum + 2 * gate_step, n) + get(new_bias_ + j, n);
          const V fresh = tanh(fma(reset, hidden, get(g + 2 * hidden_, n)));
          out = fma(update, get(h + r * step_ + j, n) - fresh, fresh);
          if (a_.keep.gates) {
            write(g, reset, n);
            write(g + hidden_, update, n);
            write(g + 2 * hidden_, fresh, n);
            write(a_.keep.new_hidden + row * hidden_ + j, hidden, n);
          }
        } else {
          const V x = gate(0);
          out = kKind == Recurrence::rnn_tanh ? tanh(x) : select(x < 0.0f, V{}, x);
          if (a_.keep.gates) write(g, out, n);
        }
        out = rounded<T>(out);
        write(next + r * step_ + j, out, n);
        if (a_.y) write(at<T>(a_.y, row * a_.y_step + j), out, n);
        if (last) write(at<T>(a_.h_n, b * hidden_ + j), out, n);
      }
    }
  }

  void keep_initial_state(int64_t r) const {  // of a sequence of no steps
    const int64_t b = sequence_of(s_, r);
    for (int64_t j = 0; j < hidden_; j++) {
      put(at<T>(a_.h_n, b * hidden_ + j), h_[0][r * step_ + j]);
      if (kLstm) put(at<T>(a_.c_n, b * hidden_ + j), c_[r * step_ + j]);
    }
  }

  const RecurrentArgs& a_;
  const RecurrentShape& s_;
  const int64_t hidden_, batch_, width_, step_, units_, chunk_;
  const bool alone_;
  float* memory_;
  int64_t taken_ = 0;
  float *h_[2], *c_, *bias_, *new_bias_, *gates_, *sums_, *x_, *w_ih_, *w_hh_;
};

}  // namespace

void recurrent_forward(const RecurrentArgs& a) {
  with_dtype(a.shape.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    switch (a.shape.kind) {
      case Recurrence::rnn_tanh:
        return Forward<Recurrence::rnn_tanh, T>(a).run();
      case Recurrence::rnn_relu:
        return Forward<Recurrence::rnn_relu, T>(a).run();
      case Recurrence::gru:
        return Forward<Recurrence::gru, T>(a).run();
      case Recurrence::lstm:
        return Forward<Recurrence::lstm, T>(a).run();
    }
  });
}

}  // namespace pyllm::ISA

#include "cpu/recurrent.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "cuda/recurrent.h"
#include "ops/ops.h"
#include "ops/packed_weight.h"
#include "ops/place.h"

namespace pyllm::ops {

namespace {

StridedMatrix matrix(const TensorView& t) { return {t.data, t.step(0), t.step(1)}; }
StridedMatrix matrix_or_none(const TensorView& t) { return t.present() ? matrix(t) : StridedMatrix{}; }
StridedMatrix row_or_none(const TensorView& t) {
  return t.present() ? StridedMatrix{t.data, 0, t.step(0)} : StridedMatrix{};
}

Recurrence check_kind(const char* op, int kind) {
  check(kind >= 0 && kind <= static_cast<int>(Recurrence::lstm), "[", op, "] kind must be 0 to 3, but got ", kind);
  return static_cast<Recurrence>(kind);
}

void check_weights(const char* op, const RecurrentShape& s, const TensorView& w_ih, const TensorView& w_hh) {
  const int64_t width = gates_of(s.kind) * s.hidden;
  for (const TensorView* w : {&w_ih, &w_hh}) {
    const char* name = w == &w_ih ? "w_ih" : "w_hh";
    check_dtype(op, name, *w, s.dtype);
    check_shape(op, name, *w, width, w == &w_ih ? s.inputs : s.hidden);
  }
}

void check_bias(const char* op, const char* name, const TensorView& t, const RecurrentShape& s) {
  if (!t.present()) return;
  check_dtype(op, name, t, s.dtype);
  check_shape(op, name, t, gates_of(s.kind) * s.hidden);
}

void check_state(const char* op, const char* name, const TensorView& t, const RecurrentShape& s) {
  check_dtype(op, name, t, s.dtype);
  check_shape(op, name, t, s.batch, s.hidden);
}

template <class... Sizes>
void check_output(const char* op, const char* name, const TensorView& t, DType dtype, Sizes... sizes) {
  check_dtype(op, name, t, dtype);
  check_shape(op, name, t, sizes...);
  check_contiguous(op, name, t);
  check_writable(op, name, t);
}

// The last two of x's dimensions are batch and inputs.
RecurrentShape shape_of(const char* op, int kind, bool reverse, const TensorView& x, int64_t hidden) {
  RecurrentShape s{};
  s.kind = check_kind(op, kind);
  check_float(op, "x", x);
  s.reverse = reverse;
  s.time = x.ndim == 3 ? x.size(0) : 1;
  s.batch = x.size(-2);
  s.inputs = x.size(-1);
  s.hidden = hidden;
  s.dtype = x.dtype;
  s.x = {x.data, x.step(-2), x.step(-1)};
  return s;
}

// What is given of w_hh decides the hidden size.
RecurrentShape shape_of(const char* op, int kind, bool reverse, const TensorView& x, const TensorView& w_ih,
                        const TensorView& w_hh) {
  check_device(op, "w_ih", w_ih);
  check_device(op, "w_hh", w_hh);
  check_ndim(op, "w_hh", w_hh, 2);
  RecurrentShape s = shape_of(op, kind, reverse, x, w_hh.size(1));
  s.w_ih = matrix(w_ih);
  s.w_hh = matrix(w_hh);
  check_weights(op, s, w_ih, w_hh);
  return s;
}

// A weight, or, where there is a format (bits, group, half scales, minimums, n, k), one packed in panels.
void take_weight(const char* op, const char* name, const RecurrentShape& s, const TensorView& w,
                 const std::vector<int64_t>& format, int64_t k, StridedMatrix& dense, PackedMatrix& packed) {
  const int64_t width = gates_of(s.kind) * s.hidden;
  if (format.empty()) {
    check_dtype(op, name, w, s.dtype);
    check_shape(op, name, w, width, k);
    dense = matrix(w);
    return;
  }
  check(format.size() == 6, "[", op, "] ", name, " must have a format of 6 numbers, but got ", format.size());
  check(format[4] == width && format[5] == k, "[", op, "] ", name, " must have shape (", width, ", ", k, "), but got (",
        format[4], ", ", format[5], ")");
  packed = {packed_weight(op, name, false, w, width, k, format[0], format[1], format[2], format[3]), w.data};
}

void take_states(const char* op, RecurrentShape& s, const TensorView& h0, const TensorView& c0) {
  if (h0.present()) check_state(op, "h0", h0, s);
  if (c0.present()) check_state(op, "c0", c0, s);
  s.h0 = matrix_or_none(h0);
  s.c0 = matrix_or_none(c0);
}

// x of a sequence: its rows must lie evenly, whatever step they belong to.
void check_sequence(const char* op, RecurrentShape& s, const TensorView& x) {
  check_ndim(op, "x", x, 3);
  if (s.batch == 1) s.x.row = x.step(0);
  check(s.time <= 1 || s.batch <= 1 || s.inputs == 0 || x.step(0) == s.batch * x.step(1), "[", op,
        "] x must have its rows evenly spaced over time and batch, but got strides ", x.step(0), " and ", x.step(1));
}

void take_lengths(const char* op, RecurrentShape& s, const TensorView& lengths) {
  if (!lengths.present()) return;
  check_dtype(op, "lengths", lengths, DType::i64);
  check_shape(op, "lengths", lengths, s.batch);
  check_contiguous(op, "lengths", lengths);
  s.lengths = lengths.as<int64_t>();
}

// Checked lengths, and the sequences in order of falling length.
std::vector<int64_t> take_order(const char* op, RecurrentShape& s, const TensorView& lengths) {
  take_lengths(op, s, lengths);
  if (!s.lengths) return {};
  for (int64_t b = 0; b < s.batch; b++)
    check(s.lengths[b] >= 0 && s.lengths[b] <= s.time, "[", op, "] lengths must be 0 to ", s.time, ", but got ",
          s.lengths[b], " for sequence ", b);
  std::vector<int64_t> order(s.batch);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return s.lengths[a] > s.lengths[b]; });
  s.order = order.data();
  return order;
}

// y: the columns of one direction, so that its rows may be wider.
int64_t check_y(const char* op, const TensorView& y, const RecurrentShape& s) {
  check_dtype(op, "y", y, s.dtype);
  check_shape(op, "y", y, s.time, s.batch, s.hidden);
  check_inner_stride(op, "y", y);
  check(s.time <= 1 || s.batch <= 1 || y.step(0) == s.batch * y.step(1), "[", op,
        "] y must have its rows evenly spaced over time and batch, but got strides ", y.step(0), " and ", y.step(1));
  return s.batch == 1 ? y.step(0) : y.step(1);
}

RecurrentActivations take_activations(const char* op, const RecurrentShape& s, const TensorView& gates,
                                      const TensorView& new_hidden, const TensorView& tanh_cell,
                                      const TensorView& cell) {
  const int64_t rows = s.time * s.batch;
  check_output(op, "gates", gates, DType::f32, rows, gates_of(s.kind) * s.hidden);
  if (s.kind == Recurrence::gru) check_output(op, "new_hidden", new_hidden, DType::f32, rows, s.hidden);
  if (s.kind == Recurrence::lstm) {
    check_output(op, "tanh_cell", tanh_cell, DType::f32, rows, s.hidden);
    check_output(op, "cell", cell, s.dtype, rows, s.hidden);
  }
  return {gates.as<float>(), new_hidden.as<float>(), tanh_cell.as<float>(), cell.data};
}

// Of a whole sequence: the biases, and where y and the last states go.
template <class Args>
void take_results(const char* op, Args& a, const TensorView& b_ih, const TensorView& b_hh, const TensorView& y,
                  const TensorView& h_n, const TensorView& c_n) {
  const RecurrentShape& s = a.shape;
  check_bias(op, "b_ih", b_ih, s);
  check_bias(op, "b_hh", b_hh, s);
  check_writable(op, "y", y);
  a.y_step = check_y(op, y, s);
  check_output(op, "h_n", h_n, s.dtype, s.batch, s.hidden);
  if (s.kind == Recurrence::lstm) check_output(op, "c_n", c_n, s.dtype, s.batch, s.hidden);
  a.b_ih = row_or_none(b_ih);
  a.b_hh = row_or_none(b_hh);
  a.y = y.data;
  a.h_n = h_n.data;
  a.c_n = c_n.data;
}

void take_gradients(const char* op, RecurrentGradients& a, const TensorView& y, const TensorView& gates,
                    const TensorView& new_hidden, const TensorView& tanh_cell, const TensorView& cell,
                    const TensorView& dy, const TensorView& dh_n, const TensorView& dc_n, const TensorView& dh0,
                    const TensorView& dc0) {
  const RecurrentShape& s = a.shape;
  a.y_step = check_y(op, y, s);
  a.y = y.data;
  a.kept = take_activations(op, s, gates, new_hidden, tanh_cell, cell);
  if (dy.present()) {
    check_dtype(op, "dy", dy, s.dtype);
    check_shape(op, "dy", dy, s.time, s.batch, s.hidden);
    check_inner_stride(op, "dy", dy);
    a.dy = dy.data;
    a.dy_time = dy.step(0);
    a.dy_batch = dy.step(1);
  }
  for (const TensorView* t : {&dh_n, &dc_n, &dh0, &dc0})
    if (t->present()) check_output(op, "gradient of a state", *t, s.dtype, s.batch, s.hidden);
  a.dh_n = dh_n.data;
  a.dc_n = dc_n.data;
  a.dh0 = dh0.data;
  a.dc0 = dc0.data;
}

// Of steps whose inputs' products are given: y decides time and batch, w_hh the hidden size.
RecurrentShape shape_of_steps(const char* op, int kind, bool reverse, const TensorView& w_hh, const TensorView& y,
                              const TensorView& h0, const TensorView& c0, const TensorView& lengths,
                              const Place& place) {
  check(place.cuda(), "[", op, "] the products of the inputs must be on a CUDA device");
  RecurrentShape s{};
  s.kind = check_kind(op, kind);
  s.reverse = reverse;
  check_float(op, "y", y);
  check_ndim(op, "y", y, 3);
  check_dtype(op, "w_hh", w_hh, y.dtype);
  check_ndim(op, "w_hh", w_hh, 2);
  s.time = y.size(0);
  s.batch = y.size(1);
  s.hidden = w_hh.size(1);
  s.dtype = y.dtype;
  check_shape(op, "w_hh", w_hh, gates_of(s.kind) * s.hidden, s.hidden);
  s.w_hh = matrix(w_hh);
  take_states(op, s, h0, c0);
  take_lengths(op, s, lengths);
  return s;
}

}  // namespace

void recurrent_forward(const char* op, int kind, bool reverse, const TensorView& x, const TensorView& w_ih,
                       const TensorView& w_hh, const std::vector<int64_t>& ih_format,
                       const std::vector<int64_t>& hh_format, const TensorView& b_ih, const TensorView& b_hh,
                       const TensorView& h0, const TensorView& c0, const TensorView& lengths, const TensorView& y,
                       const TensorView& h_n, const TensorView& c_n, const TensorView& gates,
                       const TensorView& new_hidden, const TensorView& tanh_cell, const TensorView& cell) {
  check_device(op, "x", x);
  check_ndim(op, "x", x, 3);
  check_device(op, "h_n", h_n);
  check_ndim(op, "h_n", h_n, 2);
  RecurrentArgs a{};
  a.shape = shape_of(op, kind, reverse, x, h_n.size(1));
  take_weight(op, "w_ih", a.shape, w_ih, ih_format, a.shape.inputs, a.shape.w_ih, a.packed_ih);
  take_weight(op, "w_hh", a.shape, w_hh, hh_format, a.shape.hidden, a.shape.w_hh, a.packed_hh);
  check_sequence(op, a.shape, x);
  take_states(op, a.shape, h0, c0);
  const std::vector<int64_t> order = take_order(op, a.shape, lengths);
  take_results(op, a, b_ih, b_hh, y, h_n, c_n);
  if (gates.present()) a.keep = take_activations(op, a.shape, gates, new_hidden, tanh_cell, cell);
  pyllm::recurrent_forward(a);
}

void recurrent_cell(const char* op, int kind, const TensorView& x, const TensorView& h, const TensorView& c,
                    const TensorView& w_ih, const TensorView& w_hh, const TensorView& b_ih, const TensorView& b_hh,
                    const TensorView& h_n, const TensorView& c_n) {
  check_device(op, "x", x);
  check_ndim(op, "x", x, 2);
  RecurrentArgs a{};
  a.shape = shape_of(op, kind, false, x, w_ih, w_hh);
  check_bias(op, "b_ih", b_ih, a.shape);
  check_bias(op, "b_hh", b_hh, a.shape);
  check_state(op, "h", h, a.shape);
  check_output(op, "h_n", h_n, a.shape.dtype, a.shape.batch, a.shape.hidden);
  a.shape.h0 = matrix(h);
  a.h_n = h_n.data;
  if (a.shape.kind == Recurrence::lstm) {
    check_state(op, "c", c, a.shape);
    check_output(op, "c_n", c_n, a.shape.dtype, a.shape.batch, a.shape.hidden);
    a.shape.c0 = matrix(c);
    a.c_n = c_n.data;
  }
  a.b_ih = row_or_none(b_ih);
  a.b_hh = row_or_none(b_hh);
  pyllm::recurrent_forward(a);
}

void recurrent_backward(const char* op, int kind, bool reverse, const TensorView& x, const TensorView& w_ih,
                        const TensorView& w_hh, const TensorView& h0, const TensorView& c0, const TensorView& lengths,
                        const TensorView& y, const TensorView& gates, const TensorView& new_hidden,
                        const TensorView& tanh_cell, const TensorView& cell, const TensorView& dy,
                        const TensorView& dh_n, const TensorView& dc_n, const TensorView& dx, bool add_dx,
                        const TensorView& dw_ih, const TensorView& dw_hh, const TensorView& db_ih,
                        const TensorView& db_hh, const TensorView& dh0, const TensorView& dc0) {
  check_device(op, "x", x);
  check_ndim(op, "x", x, 3);
  RecurrentBackwardArgs a{};
  a.shape = shape_of(op, kind, reverse, x, w_ih, w_hh);
  const RecurrentShape& s = a.shape;
  check_sequence(op, a.shape, x);
  take_states(op, a.shape, h0, c0);
  const std::vector<int64_t> order = take_order(op, a.shape, lengths);
  take_gradients(op, a, y, gates, new_hidden, tanh_cell, cell, dy, dh_n, dc_n, dh0, dc0);
  const int64_t width = gates_of(s.kind) * s.hidden;
  if (dw_ih.present()) check_output(op, "dw_ih", dw_ih, s.dtype, width, s.inputs);
  if (dw_hh.present()) check_output(op, "dw_hh", dw_hh, s.dtype, width, s.hidden);
  for (const TensorView* t : {&db_ih, &db_hh})
    if (t->present()) check_output(op, t == &db_ih ? "db_ih" : "db_hh", *t, s.dtype, width);
  if (dx.present()) {
    check_float(op, "dx", dx);
    check_output(op, "dx", dx, dx.dtype, s.time, s.batch, s.inputs);
    a.dx_dtype = dx.dtype;
  }
  a.add_dx = add_dx;
  a.dx = dx.data;
  a.dw_ih = dw_ih.data;
  a.dw_hh = dw_hh.data;
  a.db_ih = db_ih.data;
  a.db_hh = db_hh.data;
  pyllm::recurrent_backward(a);
}

void recurrent_steps(const char* op, int kind, bool reverse, const TensorView& sums, const TensorView& w_hh,
                     const TensorView& b_ih, const TensorView& b_hh, const TensorView& h0, const TensorView& c0,
                     const TensorView& lengths, const TensorView& y, const TensorView& h_n, const TensorView& c_n,
                     bool keep, const TensorView& new_hidden, const TensorView& tanh_cell, const TensorView& cell) {
  const Place place(op, "x", sums);
  RecurrentStepsArgs a{};
  a.shape = shape_of_steps(op, kind, reverse, w_hh, y, h0, c0, lengths, place);
  const RecurrentShape& s = a.shape;
  check_output(op, "sums", sums, DType::f32, s.time * s.batch, gates_of(s.kind) * s.hidden);
  a.sums = sums.as<float>();
  take_results(op, a, b_ih, b_hh, y, h_n, c_n);
  if (keep) a.keep = take_activations(op, s, sums, new_hidden, tanh_cell, cell);
  cuda::recurrent_steps(a, place.work());
}

void recurrent_steps_backward(const char* op, int kind, bool reverse, const TensorView& w_hh, const TensorView& h0,
                              const TensorView& c0, const TensorView& lengths, const TensorView& y,
                              const TensorView& gates, const TensorView& new_hidden, const TensorView& tanh_cell,
                              const TensorView& cell, const TensorView& dy, const TensorView& dh_n,
                              const TensorView& dc_n, const TensorView& dsums, const TensorView& dproducts,
                              const TensorView& dh0, const TensorView& dc0) {
  const Place place(op, "gates", gates);
  RecurrentStepsBackwardArgs a{};
  a.shape = shape_of_steps(op, kind, reverse, w_hh, y, h0, c0, lengths, place);
  const RecurrentShape& s = a.shape;
  take_gradients(op, a, y, gates, new_hidden, tanh_cell, cell, dy, dh_n, dc_n, dh0, dc0);
  const int64_t width = gates_of(s.kind) * s.hidden;
  check_output(op, "dsums", dsums, s.dtype, s.time * s.batch, width);
  if (s.kind == Recurrence::gru) check_output(op, "dproducts", dproducts, s.dtype, s.time * s.batch, width);
  a.dsums = dsums.data;
  a.dproducts = dproducts.data;
  cuda::recurrent_steps_backward(a, place.work());
}

}  // namespace pyllm::ops

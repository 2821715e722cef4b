#include "cpu/activations.h"

#include "cuda/activations.h"
#include "ops/ops.h"
#include "ops/place.h"

namespace pyllm::ops {

namespace {

Activation kind_of(const char* op, const std::string& name) {
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  if (name == "sigmoid") return Activation::sigmoid;
  if (name == "tanh") return Activation::tanh;
  if (name == "relu_squared") return Activation::relu_squared;
  fail(Error::value, "[", op,
       "] kind must be 'gelu', 'gelu_tanh', 'silu', 'sigmoid', 'tanh' or 'relu_squared', but got '", name, "'");
}

void check_like(const char* op, const char* name, const TensorView& t, const TensorView& like) {
  check_dtype(op, name, t, like.dtype);
  check_shape_of(op, name, t, like);
}

void check_output(const char* op, const char* name, const TensorView& t, const TensorView& like) {
  check_like(op, name, t, like);
  check_contiguous(op, name, t);
  check_writable(op, name, t);
}

struct Walk {  // contiguous tensors are one row
  bool flat;
  int64_t cols;
  Rows rows(const TensorView& t) const { return flat || !t.present() ? Rows() : t.rows(); }
};

Walk walk_over(const char* op, const TensorView& a, const TensorView& b, const TensorView& c) {
  bool flat = true;
  for (const TensorView* t : {&a, &b, &c}) {
    if (!t->present()) continue;
    flat = flat && t->contiguous();
    check_inner_stride(op, "each input", *t);
  }
  return {flat, flat ? a.numel() : a.size(-1)};
}

}  // namespace

void activation_forward(const TensorView& gate, const TensorView& up, const TensorView& out, const std::string& op_name,
                        const std::string& kind) {
  const char* op = op_name.c_str();
  const Place place(op, up.present() ? "gate" : "x", gate);
  check_float(op, up.present() ? "gate" : "x", gate);
  if (up.present()) check_like(op, "up", up, gate);
  check_output(op, "out", out, gate);
  const Walk walk = walk_over(op, gate, up, TensorView::absent());
  place.prefer_large_pages(out);
  const ActivationArgs args{kind_of(op, kind), gate.dtype,      walk.cols,     gate.data,
                            up.data,           walk.rows(gate), walk.rows(up), out.data};
  place.cuda() ? cuda::activation_forward(args, place.work()) : pyllm::activation_forward(args);
}

void activation_backward(const TensorView& dy, const TensorView& gate, const TensorView& up, const TensorView& dgate,
                         const TensorView& dup, const std::string& op_name, const std::string& kind) {
  const char* op = op_name.c_str();
  const Place place(op, up.present() ? "gate" : "x", gate);
  check_float(op, up.present() ? "gate" : "x", gate);
  check_like(op, "dy", dy, gate);
  if (up.present()) check_like(op, "up", up, gate);
  check_output(op, "dgate", dgate, gate);
  if (up.present()) check_output(op, "dup", dup, gate);
  const Walk walk = walk_over(op, dy, gate, up);
  place.prefer_large_pages(dgate);
  place.prefer_large_pages(dup);
  const ActivationBackwardArgs args{kind_of(op, kind), gate.dtype,      walk.cols,     dy.data,    gate.data, up.data,
                                    walk.rows(dy),     walk.rows(gate), walk.rows(up), dgate.data, dup.data};
  place.cuda() ? cuda::activation_backward(args, place.work()) : pyllm::activation_backward(args);
}

}  // namespace pyllm::ops

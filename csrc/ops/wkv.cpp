#include "cpu/wkv.h"

#include "cuda/wkv.h"
#include "ops/ops.h"
#include "ops/place.h"

namespace pyllm::ops {

namespace {

constexpr const char* kOp = "wkv";

WkvInput take_input(const char* name, const TensorView& t, const WkvShape& s) {
  check_dtype(kOp, name, t, s.dtype);
  check_shape(kOp, name, t, s.batch, s.time, s.heads, s.dim);
  check_inner_stride(kOp, name, t);
  return {t.data, t.step(0), t.step(1), t.step(2)};
}

float* take_state(const char* name, const TensorView& t, const WkvShape& s) {
  if (!t.present()) return nullptr;
  check_dtype(kOp, name, t, DType::f32);
  check_shape(kOp, name, t, s.batch, s.heads, s.dim, s.dim);
  check_contiguous(kOp, name, t);
  return t.as<float>();
}

char* take_output(const char* name, const TensorView& t, const WkvShape& s) {
  take_input(name, t, s);
  check_contiguous(kOp, name, t);
  check_writable(kOp, name, t);
  return t.data;
}

float* take_kept(const TensorView& t, const WkvShape& s) {
  check_dtype(kOp, "kept", t, DType::f32);
  check_shape(kOp, "kept", t, s.batch, s.heads, s.time > 0 ? (s.time - 1) / kWkvChunk : 0, s.dim, s.dim);
  check_contiguous(kOp, "kept", t);
  return t.as<float>();
}

WkvShape shape_of(const TensorView& r, const TensorView& w, const TensorView& k, const TensorView& v,
                  const TensorView& a, const TensorView& b, const TensorView& state, const TensorView& lengths,
                  const Place& place) {
  check_float(kOp, "r", r);
  check_ndim(kOp, "r", r, 4);
  WkvShape s{};
  s.batch = r.size(0);
  s.time = r.size(1);
  s.heads = r.size(2);
  s.dim = r.size(3);
  s.dtype = r.dtype;
  if (place.cuda() && s.dim > kMostCudaDim)
    fail(Error::not_implemented, "[wkv] on a CUDA device, r must have heads of at most ", kMostCudaDim, ", but got ",
         s.dim);
  s.r = take_input("r", r, s);
  s.w = take_input("w", w, s);
  s.k = take_input("k", k, s);
  s.v = take_input("v", v, s);
  s.a = take_input("a", a, s);
  s.b = take_input("b", b, s);
  s.state = take_state("state", state, s);
  if (!lengths.present()) return s;
  check_dtype(kOp, "lengths", lengths, DType::i64);
  check_shape(kOp, "lengths", lengths, s.batch);
  check_contiguous(kOp, "lengths", lengths);
  s.lengths = lengths.as<int64_t>();
  if (place.cuda()) return s;  // whose kernels check them
  for (int64_t i = 0; i < s.batch; i++)
    check(s.lengths[i] >= 0 && s.lengths[i] <= s.time, "[wkv] lengths must be 0 to ", s.time, ", but got ",
          s.lengths[i], " for sequence ", i);
  return s;
}

}  // namespace

int64_t wkv_chunk() { return kWkvChunk; }

void wkv_forward(const TensorView& r, const TensorView& w, const TensorView& k, const TensorView& v,
                 const TensorView& a, const TensorView& b, const TensorView& state, const TensorView& lengths,
                 const TensorView& y, const TensorView& final_state, const TensorView& kept) {
  const Place place(kOp, "r", r);
  WkvArgs args{};
  args.shape = shape_of(r, w, k, v, a, b, state, lengths, place);
  args.y = take_output("y", y, args.shape);
  check_device(kOp, "final_state", final_state);
  args.final_state = take_state("final_state", final_state, args.shape);
  check_writable(kOp, "final_state", final_state);
  if (kept.present()) {
    args.kept = take_kept(kept, args.shape);
    check_writable(kOp, "kept", kept);
  }
  place.cuda() ? cuda::wkv_forward(args, place.work()) : pyllm::wkv_forward(args);
}

void wkv_backward(const TensorView& r, const TensorView& w, const TensorView& k, const TensorView& v,
                  const TensorView& a, const TensorView& b, const TensorView& state, const TensorView& lengths,
                  const TensorView& kept, const TensorView& dy, const TensorView& dfinal, const TensorView& dr,
                  const TensorView& dw, const TensorView& dk, const TensorView& dv, const TensorView& da,
                  const TensorView& db, const TensorView& dstate) {
  const Place place(kOp, "r", r);
  WkvBackwardArgs args{};
  args.shape = shape_of(r, w, k, v, a, b, state, lengths, place);
  const WkvShape& s = args.shape;
  args.kept = take_kept(kept, s);
  args.dy = take_input("dy", dy, s);
  args.dfinal = take_state("dfinal", dfinal, s);
  args.dr = take_output("dr", dr, s);
  args.dw = take_output("dw", dw, s);
  args.dk = take_output("dk", dk, s);
  args.dv = take_output("dv", dv, s);
  args.da = take_output("da", da, s);
  args.db = take_output("db", db, s);
  args.dstate = take_state("dstate", dstate, s);
  if (dstate.present()) check_writable(kOp, "dstate", dstate);
  place.cuda() ? cuda::wkv_backward(args, place.work()) : pyllm::wkv_backward(args);
}

}  // namespace pyllm::ops

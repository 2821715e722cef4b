#include "cpu/attention.h"

#include <algorithm>
#include <string>

#include "cuda/attention.h"
#include "ops/ops.h"
#include "ops/place.h"

namespace pyllm::ops {

namespace {

constexpr int64_t kMaxDim = 256;

int64_t integer_at(const TensorView& t, int64_t i) {
  return t.dtype == DType::i64 ? t.as<int64_t>()[i * t.step(0)] : t.as<int32_t>()[i * t.step(0)];
}

void check_integer(const char* op, const std::string& name, const TensorView& t) {
  check_device(op, name.c_str(), t);
  if (t.dtype != DType::i64 && t.dtype != DType::i32)
    fail(Error::type, "[", op, "] ", name, " must be int64 or int32, but got ", name_of(t.dtype));
}

void check_output(const char* op, const char* name, const TensorView& t) {
  check_contiguous(op, name, t);
  check_writable(op, name, t);
}

void copy_steps(const TensorView& t, int64_t* step) {
  for (int i = 0; i < 3; i++) step[i] = t.step(i);
}

void set_pages(const char* op, const TensorView& k, const TensorView& key_lengths, const TensorView& page_table,
               AttentionArgs& a) {
  check_dtype(op, "page_table", page_table, DType::i32);
  check_ndim(op, "page_table", page_table, 2);
  check_shape(op, "page_table", page_table, a.batch, page_table.size(1));
  check_inner_stride(op, "page_table", page_table);
  check(k.size(1) > 0 && k.size(1) % kKeyTile == 0, "[", op, "] a page of k must have a multiple of ", kKeyTile,
        " positions, but got ", k.size(1));
  if (!key_lengths.present()) fail(Error::type, "[", op, "] key_lengths must be given with a page_table");
  a.page_table = page_table.as<int32_t>();
  a.table_step = page_table.step(0);
  a.page_size = k.size(1);
  a.pages = k.size(0);
  a.keys = page_table.size(1) * k.size(1);
}

// Of the keys that count, the entries beyond are never read.
void check_pages(const char* op, const AttentionArgs& a, int64_t batch, int64_t length, int64_t pages) {
  for (int64_t i = 0; i * a.page_size < length; i++) {
    const int32_t page = a.page_table[batch * a.table_step + i];
    if (page < 0 || page >= pages)
      fail(Error::index, "[", op, "] page_table[", batch, ", ", i, "] must be in [0, ", pages, "), but got ", page);
  }
}

// Everything that forward and backward are given alike. `reads`: lengths and pages are
// read here; on a CUDA device only the kernels can.
AttentionArgs inputs(const char* op, bool reads, const TensorView& q, const TensorView& k, const TensorView& v,
                     const TensorView& bias, const TensorView& key_lengths, const TensorView& query_segments,
                     const TensorView& key_segments, const TensorView& page_table, bool causal, int64_t window,
                     double scale, double softcap) {
  const TensorView* const qkv[] = {&q, &k, &v};
  const char* const names[] = {"q", "k", "v"};
  const bool bytes = page_table.present() && k.present() && k.dtype == DType::i8;
  if (bytes && !reads)
    fail(Error::not_implemented, "[", op, "] k must be in pages of q's dtype on a CUDA device, but got int8");
  for (int i = 0; i < 3; i++) {
    i == 0 ? check_float(op, names[i], q) : check_dtype(op, names[i], *qkv[i], bytes ? DType::i8 : q.dtype);
    check_ndim(op, names[i], *qkv[i], 4);
    check_inner_stride(op, names[i], *qkv[i]);
  }
  AttentionArgs a{};
  a.batch = q.size(0), a.queries = q.size(1), a.heads = q.size(2), a.dim = q.size(3);
  a.keys = k.size(1), a.kv_heads = k.size(2), a.value_dim = bytes ? int8_dim(v.size(3)) : v.size(3);
  if (page_table.present()) set_pages(op, k, key_lengths, page_table, a);
  check_shape(op, "k", k, page_table.present() ? k.size(0) : a.batch, k.size(1), a.kv_heads,
              bytes ? int8_width(a.dim) : a.dim);
  check_shape(op, "v", v, k.size(0), k.size(1), a.kv_heads, bytes ? int8_width(a.value_dim) : a.value_dim);
  if (bytes) check_contiguous(op, "k", k), check_contiguous(op, "v", v);
  for (const int64_t* dim : {&a.dim, &a.value_dim})
    check(*dim >= 1 && *dim <= kMaxDim, "[", op, "] ", dim == &a.dim ? "q" : "v", " must have a head size of 1 to ",
          kMaxDim, ", but got ", *dim);
  check(a.kv_heads == 0 ? a.heads == 0 : a.heads > 0 && a.heads % a.kv_heads == 0, "[", op,
        "] q's heads must be a positive multiple of k's ", a.kv_heads, ", but got ", a.heads);
  check(window >= 0, "[", op, "] window must be 1 or more, but got ", window);
  check(softcap >= 0 && softcap < 1e30, "[", op, "] softcap must be positive, but got ", softcap);
  a.dtype = q.dtype, a.stored = k.dtype;
  a.q = q.data, a.k = k.data, a.v = v.data;
  copy_steps(q, a.q_step), copy_steps(k, a.k_step), copy_steps(v, a.v_step);
  a.causal = causal;
  a.window = std::min(window, a.keys + a.queries);
  a.scale = static_cast<float>(scale), a.softcap = static_cast<float>(softcap);
  int64_t longest = key_lengths.present() ? 0 : a.keys;
  if (key_lengths.present()) {
    check_integer(op, "key_lengths", key_lengths);
    check_shape(op, "key_lengths", key_lengths, a.batch);
    check_contiguous(op, "key_lengths", key_lengths);
    for (int64_t i = 0; reads && i < a.batch; i++) {
      const int64_t n = integer_at(key_lengths, i);
      check(n >= 0 && n <= a.keys, "[", op, "] key_lengths must be 0 to ", a.keys, ", but got ", n, " at ", i);
      if (a.page_table) check_pages(op, a, i, n, k.size(0));
      longest = std::max(longest, n);
    }
    a.key_lengths = key_lengths.data;
    a.length_dtype = key_lengths.dtype;
  }
  if (bias.present()) {
    check_float(op, "bias", bias);
    const int64_t full[] = {a.batch, a.heads, a.queries, a.keys};  // in pages, the keys that count are enough
    const int64_t least = !a.page_table ? a.keys : reads ? longest : 0;
    a.bias_keys = a.keys;
    bool fits = bias.ndim <= 4;
    for (int i = 0; fits && i < bias.ndim; i++) {
      const int64_t n = bias.size(i), to = full[4 - bias.ndim + i];
      fits = n == to || n == 1 || (4 - bias.ndim + i == 3 && least <= n && n <= to);
      a.bias_step[4 - bias.ndim + i] = n == 1 ? 0 : bias.step(i);
      if (n != 1 && 4 - bias.ndim + i == 3) a.bias_keys = n;
    }
    check(fits, "[", op, "] bias must broadcast to (", a.batch, ", ", a.heads, ", ", a.queries, ", ", least,
          "), but got ", bias.shape_text());
    a.bias = bias.data;
    a.bias_dtype = bias.dtype;
  }
  if (query_segments.present() || key_segments.present()) {
    check_integer(op, "segment_ids of the queries", query_segments);
    check_shape(op, "segment_ids of the queries", query_segments, a.batch, a.queries);
    check_dtype(op, "segment_ids of the keys", key_segments, query_segments.dtype);
    check_shape(op, "segment_ids of the keys", key_segments, a.batch, a.keys);
    a.query_segments = query_segments.data, a.key_segments = key_segments.data;
    a.segment_dtype = query_segments.dtype;
    for (int i = 0; i < 2; i++) {
      a.query_segment_step[i] = query_segments.step(i);
      a.key_segment_step[i] = key_segments.step(i);
    }
  }
  return a;
}

void check_result(const char* op, const char* name, const TensorView& t, const AttentionArgs& a) {
  check_dtype(op, name, t, a.dtype);
  check_shape(op, name, t, a.batch, a.queries, a.heads, a.value_dim);
}

void check_rows(const char* op, const TensorView& lse, const AttentionArgs& a) {
  check_dtype(op, "lse", lse, DType::f32);
  check_shape(op, "lse", lse, a.batch, a.heads, a.queries);
  check_output(op, "lse", lse);
}

void check_weights(const char* op, const char* name, const TensorView& t, const AttentionArgs& a) {
  check_dtype(op, name, t, a.dtype);
  check_shape(op, name, t, a.batch, a.heads, a.queries, a.keys);
  check_contiguous(op, name, t);
}

void check_gradient(const char* op, const char* name, const TensorView& t, const TensorView& of) {
  if (!t.present()) return;
  check_dtype(op, name, t, of.dtype);
  bool same = t.ndim == of.ndim;
  for (int i = 0; same && i < t.ndim; i++) same = t.size(i) == of.size(i);
  check(same, "[", op, "] ", name, " must have shape ", of.shape_text(), ", but got ", t.shape_text());
  check_output(op, name, t);
}

}  // namespace

void attention_forward(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& bias,
                       const TensorView& key_lengths, const TensorView& query_segments, const TensorView& key_segments,
                       const TensorView& page_table, const TensorView& out, const TensorView& lse,
                       const TensorView& weights, bool causal, int64_t window, double scale, double softcap) {
  const char* op = "attention";
  const Place place(op, "q", q);
  const AttentionArgs a = inputs(op, !place.cuda(), q, k, v, bias, key_lengths, query_segments, key_segments,
                                 page_table, causal, window, scale, softcap);
  check_result(op, "out", out, a);
  check_output(op, "out", out);
  if (lse.present() || weights.present()) check_rows(op, lse, a);
  if (weights.present()) {
    check_weights(op, "weights", weights, a);
    check_writable(op, "weights", weights);
  }
  const AttentionForwardArgs args{a, out.data, lse.as<float>(), weights.data};
  place.cuda() ? cuda::attention_forward(args, place.work()) : pyllm::attention_forward(args);
}

void attention_backward(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& bias,
                        const TensorView& key_lengths, const TensorView& query_segments, const TensorView& key_segments,
                        const TensorView& out, const TensorView& lse, const TensorView& weights, const TensorView& dout,
                        const TensorView& dweights, const TensorView& dq, const TensorView& dk, const TensorView& dv,
                        const TensorView& dbias, bool causal, int64_t window, double scale, double softcap) {
  const char* op = "attention backward";
  const Place place(op, "q", q);
  const AttentionArgs a = inputs(op, !place.cuda(), q, k, v, bias, key_lengths, query_segments, key_segments,
                                 TensorView::absent(), causal, window, scale, softcap);
  check_result(op, "out", out, a);
  check_contiguous(op, "out", out);
  check_result(op, "dout", dout, a);
  check_inner_stride(op, "dout", dout);
  check_rows(op, lse, a);
  if (dweights.present()) {
    check_weights(op, "weights", weights, a);
    check_weights(op, "dweights", dweights, a);
  }
  check_gradient(op, "dq", dq, q);
  check_gradient(op, "dk", dk, k);
  check_gradient(op, "dv", dv, v);
  check(dk.present() == dv.present(), "[", op, "] dk and dv must be asked for together");
  AttentionBackwardArgs b{a,
                          out.data,
                          dout.data,
                          {},
                          lse.as<float>(),
                          dweights.present() ? weights.data : nullptr,
                          dweights.data,
                          dq.data,
                          dk.data,
                          dv.data,
                          dbias.data,
                          {1, 1, 1, 1}};
  copy_steps(dout, b.dout_step);
  if (dbias.present()) {
    check(bias.present(), "[", op, "] dbias needs a bias");
    check_gradient(op, "dbias", dbias, bias);
    for (int i = 0; i < dbias.ndim; i++) b.dbias_size[4 - dbias.ndim + i] = dbias.size(i);
  }
  place.cuda() ? cuda::attention_backward(b, place.work()) : pyllm::attention_backward(b);
}

}  // namespace pyllm::ops

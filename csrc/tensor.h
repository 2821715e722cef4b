// TensorView: a non-owning view of someone else's tensor, the typed error, and the checks that every op shares.
#pragma once
#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "dtype.h"
#include "rows.h"

namespace pyllm {

struct Error : std::runtime_error {
  // ValueError, TypeError, IndexError, NotImplementedError, RuntimeError
  enum Kind { value, type, index, not_implemented, runtime } kind;
  Error(Kind k, const std::string& message) : std::runtime_error(message), kind(k) {}
};

template <class... Parts>
[[noreturn]] void fail(Error::Kind kind, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(kind, text.str());
}

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) fail(Error::value, parts...);
}

constexpr int kMaxDims = 8;

struct TensorView {
  char* data = nullptr;
  DType dtype = DType::f32;
  int32_t device_type = 0, device_id = 0;  // DLPack's
  void* stream = nullptr;                  // of a CUDA device: where its work is in order
  int32_t ndim = 0;
  bool read_only = false;
  int64_t shape[kMaxDims] = {}, stride[kMaxDims] = {};  // strides in elements

  bool present() const { return ndim >= 0; }  // false for an argument that was None, made by absent()
  static TensorView absent() {
    TensorView t;
    t.ndim = -1;
    return t;
  }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
  int64_t size(int i) const { return shape[i < 0 ? i + ndim : i]; }
  int64_t step(int i) const { return stride[i < 0 ? i + ndim : i]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; i++) n *= shape[i];
    return n;
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; i--) {
      if (shape[i] == 0) return true;
      if (shape[i] != 1 && stride[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
  Rows rows() const {  // everything but the last dimension
    Rows r;
    for (int i = ndim - 2; i >= 0; i--) r.add(shape[i], stride[i]);
    return r;
  }
  struct ShapeText;  // written only where a check fails: most calls have no use for the text
  ShapeText shape_text() const;
};

struct TensorView::ShapeText {
  const TensorView& t;
  friend std::ostream& operator<<(std::ostream& out, const ShapeText& text) {
    out << '(';
    for (int i = 0; i < text.t.ndim; i++) out << (i ? ", " : "") << text.t.shape[i];
    return out << (text.t.ndim == 1 ? ",)" : ")");
  }
};
inline TensorView::ShapeText TensorView::shape_text() const { return {*this}; }

// An argument that is one number for all rows, or a tensor with one for each.
struct Setting {
  double number = 0;
  int64_t integer = 0;
  bool is_integer = false, too_large = false;  // too_large: an int beyond 64 bits
  TensorView tensor = TensorView::absent();
};

constexpr int32_t kCpu = 1, kCuda = 2;  // DLPack's device types
struct DeviceKey {
  int32_t type = kCpu, id = 0;
};
// Where the tensors of the op that this thread runs must be: on the CPU, unless the op says otherwise (ops/place.h).
inline thread_local DeviceKey expected_device;

// False while emulated CUDA kernels do, so that ids are checked where a GPU's kernels check them.
inline thread_local bool reads_ids = true;

[[noreturn]] void fail_device(const char* op, const char* arg, const TensorView& t);

// Checks shared by the files in ops/. `op` and `arg` name the place for the user: "[layer_norm] weight must ...".
inline void check_device(const char* op, const char* arg, const TensorView& t) {
  if (!t.present()) fail(Error::type, "[", op, "] ", arg, " must be a tensor, but got None");
  if (t.device_type != expected_device.type || (t.device_type == kCuda && t.device_id != expected_device.id))
    fail_device(op, arg, t);
}
inline void check_float(const char* op, const char* arg, const TensorView& t) {
  check_device(op, arg, t);
  if (t.dtype != DType::f32 && t.dtype != DType::bf16 && t.dtype != DType::f16)
    fail(Error::type, "[", op, "] ", arg, " must be float32, bfloat16 or float16, but got ", name_of(t.dtype));
}
inline void check_dtype(const char* op, const char* arg, const TensorView& t, DType expected) {
  check_device(op, arg, t);
  if (t.dtype != expected)
    fail(Error::type, "[", op, "] ", arg, " must be ", name_of(expected), ", but got ", name_of(t.dtype));
}
inline void check_ndim(const char* op, const char* arg, const TensorView& t, int ndim) {
  check(t.ndim == ndim, "[", op, "] ", arg, " must have ", ndim, " dimension(s), but got shape ", t.shape_text());
}
template <class... Sizes>
void check_shape(const char* op, const char* arg, const TensorView& t, Sizes... sizes) {
  const int64_t expected[] = {static_cast<int64_t>(sizes)...};
  bool same = t.ndim == sizeof...(sizes);
  for (int i = 0; same && i < t.ndim; i++) same = t.shape[i] == expected[i];
  if (same) return;
  TensorView e;
  e.ndim = sizeof...(sizes);
  std::copy_n(expected, e.ndim, e.shape);
  fail(Error::value, "[", op, "] ", arg, " must have shape ", e.shape_text(), ", but got ", t.shape_text());
}
inline void check_shape_of(const char* op, const char* arg, const TensorView& t, const TensorView& like) {
  bool same = t.ndim == like.ndim;
  for (int i = 0; same && i < t.ndim; i++) same = t.shape[i] == like.shape[i];
  check(same, "[", op, "] ", arg, " must have shape ", like.shape_text(), ", but got ", t.shape_text());
}
inline void check_contiguous(const char* op, const char* arg, const TensorView& t) {
  check(t.contiguous(), "[", op, "] ", arg, " must be contiguous, but got strides that are not, shape ",
        t.shape_text());
}
inline void check_inner_stride(const char* op, const char* arg, const TensorView& t) {
  check(t.ndim == 0 || t.size(-1) <= 1 || t.step(-1) == 1 || t.numel() == 0, "[", op, "] ", arg,
        " must have stride 1 in its last dimension, but got ", t.ndim ? t.step(-1) : 0);
}
// Every element a whole number in [0, bound), or `allowed`; `ids` is contiguous. The first that is not is named by its
// position. On a CUDA device the kernels find it (cuda/device.h).
inline void check_ids(const char* op, const char* arg, const TensorView& ids, int64_t bound, int64_t allowed = 0) {
  check_device(op, arg, ids);
  if (ids.dtype != DType::i64 && ids.dtype != DType::i32)
    fail(Error::type, "[", op, "] ", arg, " must be int64 or int32, but got ", name_of(ids.dtype));
  check_contiguous(op, arg, ids);
  if (ids.device_type == kCuda || !reads_ids) return;
  const auto scan = [&](const auto* p, int64_t n) {
    uint64_t signs = 0;  // of ids and of what they lack to the last one; without an early end, so that it is vectorised
    for (int64_t i = 0; i < n; i++) {
      const auto id = static_cast<uint64_t>(p[i]);
      signs |= id | (static_cast<uint64_t>(bound) - 1 - id);
    }
    if (static_cast<int64_t>(signs) >= 0) return;
    for (int64_t i = 0; i < n; i++) {
      if (static_cast<uint64_t>(p[i]) < static_cast<uint64_t>(bound) || (p[i] == allowed && allowed != 0)) continue;
      std::string position;
      for (int64_t d = ids.ndim - 1, rest = i; d >= 0; rest /= ids.shape[d--])
        position = std::to_string(rest % ids.shape[d]) + (position.empty() ? "" : ", ") + position;
      fail(Error::index, "[", op, "] ", arg, "[", position, "] must be in [0, ", bound, "), but got ", p[i]);
    }
  };
  ids.dtype == DType::i64 ? scan(ids.as<int64_t>(), ids.numel()) : scan(ids.as<int32_t>(), ids.numel());
}
inline void check_writable(const char* op, const char* arg, const TensorView& t) {
  check(!t.read_only, "[", op, "] ", arg, " must be writable, but got a read-only array");
}

}  // namespace pyllm

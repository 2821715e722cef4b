// Python object -> TensorView. torch >= 2.10 goes through DLPack's C exchange table (0.1 us a tensor, nothing allocated);
// NumPy, older torch and every other array library through __dlpack__(), whose capsule is held for the call.
#pragma once
#include <pybind11/pybind11.h>

#include <cmath>

#include "dlpack.h"
#include "program/program.h"
#include "tensor.h"

namespace pyllm {

inline const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  static PyTypeObject* last = nullptr;  // guarded by the GIL
  static const dlpack::ExchangeApi* api = nullptr;
  if (type == last) return api;
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (!capsule) {
    PyErr_Clear();
    return nullptr;
  }
  auto* found = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (!found) PyErr_Clear();
  if (!found || found->version.major != 1 || !found->tensor_from_py_no_sync) return nullptr;
  Py_INCREF(type);  // the cached type must outlive its entry
  last = type;
  return api = found;
}

inline TensorView view_of(const dlpack::Tensor& t, bool read_only) {
  TensorView v;
  if (t.ndim < 0 || t.ndim > kMaxDims)
    fail(Error::value, "tensors have 0 to ", kMaxDims, " dimensions, but got ", t.ndim);
  const auto [code, bits, lanes] = t.dtype;
  if (code == dlpack::kFloat && bits == 32 && lanes == 1)
    v.dtype = DType::f32;
  else if (code == dlpack::kBfloat && bits == 16 && lanes == 1)
    v.dtype = DType::bf16;
  else if (code == dlpack::kFloat && bits == 16 && lanes == 1)
    v.dtype = DType::f16;
  else if (code == dlpack::kFloat && bits == 64 && lanes == 1)
    v.dtype = DType::f64;
  else if (code == dlpack::kInt && bits == 64 && lanes == 1)
    v.dtype = DType::i64;
  else if (code == dlpack::kInt && bits == 32 && lanes == 1)
    v.dtype = DType::i32;
  else if (code == dlpack::kBool && bits == 8 && lanes == 1)
    v.dtype = DType::boolean;
  else if (code == dlpack::kUInt && bits == 8 && lanes == 1)
    v.dtype = DType::u8;
  else if (code == dlpack::kInt && bits == 8 && lanes == 1)
    v.dtype = DType::i8;
  else
    fail(Error::type,
         "dtype must be float32, bfloat16, float16, float64, int64, int32, int8, uint8 or bool, but got DLPack type "
         "code ",
         int(code), " with ", int(bits), " bits");
  v.data = static_cast<char*>(t.data) + t.byte_offset;
  v.device_type = t.device.type;
  v.device_id = t.device.id;
  v.ndim = t.ndim;
  v.read_only = read_only;
  int64_t step = 1;
  for (int i = t.ndim - 1; i >= 0; i--) {
    v.shape[i] = t.shape[i];
    v.stride[i] = t.strides ? t.strides[i] : step;
    step *= t.shape[i];
  }
  return v;
}

}  // namespace pyllm

namespace pybind11::detail {

template <>
struct type_caster<pyllm::TensorView> {
  PYBIND11_TYPE_CASTER(pyllm::TensorView, const_name("TensorView"));

  bool load(handle source, bool) {
    using namespace pyllm::dlpack;
    if (source.is_none()) {
      value = pyllm::TensorView::absent();
      return true;
    }
    if (const auto* api = pyllm::exchange_api(Py_TYPE(source.ptr()))) {
      Tensor t;
      if (api->tensor_from_py_no_sync(source.ptr(), &t) != 0) throw error_already_set();
      value = pyllm::view_of(t, false);
      if (t.device.type == kCUDA && api->current_work_stream(kCUDA, t.device.id, &value.stream) != 0)
        throw error_already_set();
      keep(source);
      return true;
    }
    if (!hasattr(source, "__dlpack__")) return false;
    object exporter = reinterpret_borrow<object>(source);
    if (getattr(source, "requires_grad", bool_(false)).cast<bool>()) exporter = source.attr("detach")();
    try {
      owner = exporter.attr("__dlpack__")(arg("max_version") = make_tuple(1, 1));
    } catch (error_already_set& e) {
      if (!e.matches(PyExc_TypeError)) throw;  // producers older than DLPack 1.0 do not know max_version
      owner = exporter.attr("__dlpack__")();
    }
    if (PyCapsule_IsValid(owner.ptr(), "dltensor_versioned")) {
      auto* m = static_cast<ManagedTensorVersioned*>(PyCapsule_GetPointer(owner.ptr(), "dltensor_versioned"));
      if (m->version.major != 1) pyllm::fail(pyllm::Error::type, "DLPack 1.x expected, but got ", m->version.major);
      value = pyllm::view_of(m->tensor, m->flags & kFlagReadOnly);
    } else {
      auto* m = static_cast<ManagedTensor*>(PyCapsule_GetPointer(owner.ptr(), "dltensor"));
      if (!m) throw error_already_set();
      value = pyllm::view_of(m->tensor, false);
    }
    if (value.device_type == kCUDA)  // nothing else says on which stream its work is in order
      pyllm::fail(pyllm::Error::not_implemented,
                  "a CUDA tensor must come through DLPack's exchange table (torch 2.10 or later)");
    keep(source);
    return true;
  }

 private:
  // A replay needs the memory still, wherever the tensor's `data` are put meanwhile.
  void keep(handle source) const {
    if (!pyllm::recording || pyllm::recording->keeps(value)) return;
    PyObject* kept = PyObject_CallMethod(source.ptr(), "untyped_storage", nullptr);
    if (!kept) {  // no tensor of torch's
      PyErr_Clear();
      kept = source.inc_ref().ptr();
    }
    pyllm::recording->keep({kept, [](PyObject* o) { Py_DECREF(o); }});  // a Program ends where the GIL is held
  }

  object owner;  // the unconsumed capsule: its destructor gives the tensor back
};

template <>
struct type_caster<pyllm::Setting> {
  PYBIND11_TYPE_CASTER(pyllm::Setting, const_name("float | TensorView"));

  bool load(handle source, bool convert) {
    if (PyFloat_Check(source.ptr())) {
      value.number = PyFloat_AS_DOUBLE(source.ptr());
      return true;
    }
    if (PyLong_Check(source.ptr())) {
      int overflow = 0;
      value.integer = PyLong_AsLongLongAndOverflow(source.ptr(), &overflow);
      value.number = overflow ? std::copysign(HUGE_VAL, overflow) : static_cast<double>(value.integer);
      value.is_integer = true;
      value.too_large = overflow != 0;
      return true;
    }
    if (!view.load(source, convert)) return false;
    value.tensor = static_cast<pyllm::TensorView&>(view);
    return true;
  }

 private:
  type_caster<pyllm::TensorView> view;  // holds the capsule, where there is one
};

}  // namespace pybind11::detail

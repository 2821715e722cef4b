// The compiled module: a table of contents.
#include <pybind11/stl.h>

#include <cstdlib>
#include <tuple>
#include <type_traits>

#include "cpu/amx.h"
#include "cpu/dispatch.h"
#include "cpu/linear.h"
#include "cpu/threads.h"
#include "cpu/vnni.h"
#include "cuda/device.h"
#include "ops/ops.h"
#include "program/program.h"
#include "tensor_caster.h"

namespace py = pybind11;
using namespace pyllm;

namespace {

py::dict info() {
  py::dict d;
  d["version"] = PYLLM_VERSION;
  d["isa"] = cpu::isa_name();
  d["isas"] = cpu::available_isas();
  d["vnni"] = cpu::has_vnni();
  d["amx"] = cpu::has_amx();
  d["threads"] = cpu::num_threads();
  d["thread_backend"] = cpu::thread_backend();
#if PYLLM_WITH_CUDA
  d["cuda_built"] = true;
  d["cuda_devices"] = cuda::device_count();
#else
  d["cuda_built"] = false;
  d["cuda_devices"] = 0;
#endif
  d["cuda_emulated"] = PYLLM_EMULATE_CUDA != 0;
  return d;
}

void set_num_threads(int n) {
  check(n >= 1 && n <= 4096, "num_threads must be 1 to 4096, but got ", n);
  cpu::set_num_threads(n);
}

void synchronize([[maybe_unused]] int device) {
#if PYLLM_WITH_CUDA
  cuda::synchronize(device);
#else
  fail(Error::not_implemented, "[synchronize] this build of pyllm has no CUDA kernels");
#endif
}

// Raises what a signal's handler does: KeyboardInterrupt, for Ctrl-C.
void raise_signals() {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// What a recorded call holds of an argument: itself, or a copy of what it points to.
template <class T>
using Held = std::conditional_t<std::is_same_v<std::decay_t<T>, const char*>, std::string, std::decay_t<T>>;
template <class T>
decltype(auto) argument(const Held<T>& held) {
  if constexpr (std::is_same_v<std::decay_t<T>, const char*>)
    return held.c_str();
  else
    return held;
}

// A recorded argument as it is for a share of the rows.
template <class T>
T cut(const RowScope&, const T& held) {
  return held;
}
TensorView cut(const RowScope& rows, const TensorView& held) { return rows.has(held) ? rows.cut(held) : held; }

template <class T>
bool can_be_cut(const RowScope&, const T&) {
  return true;
}
bool can_be_cut(const RowScope& rows, const TensorView& t) {
  return !rows.has(t) || (t.ndim >= 1 && t.shape[0] == rows.capacity);
}

// A kernel's function: the views are taken first, then the GIL is given up while it runs, or is recorded.
template <class... Args>
void def(py::module_& m, const char* name, void (*f)(Args...)) {
  const auto call = [f, name](Args... args) {
    if (!recording) return f(args...);
    std::tuple<Held<Args>...> held(args...);
    const auto run = [f](const auto&... a) { f(argument<Args>(a)...); };
    const auto rows = recording->rows();
    if (!rows) return recording->append(name, [run, held] { std::apply(run, held); });
    if (!std::apply([&](const auto&... a) { return (can_be_cut(*rows, a) && ...); }, held))
      recording->note_unfit(std::string(name) + " of an expert's rows in other than their first dimension");
    recording->append(name, [run, held, rows] {
      if (rows->empty()) return;
      std::apply(run, std::apply([&](const auto&... a) { return std::tuple<Held<Args>...>(cut(*rows, a)...); }, held));
    });
  };
  m.def(name, call, py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Error& e) {
      PyObject* const types[] = {PyExc_ValueError, PyExc_TypeError, PyExc_IndexError, PyExc_NotImplementedError,
                                 PyExc_RuntimeError};
      PyErr_SetString(types[e.kind], e.what());
    }
  });
  m.def("info", &info);
  m.def("set_num_threads", &set_num_threads);
  m.def("num_threads", &cpu::num_threads);
  m.def("set_isa", &cpu::set_isa);
  m.def("set_vnni", &cpu::set_vnni);
  m.def("set_amx", &cpu::set_amx);
  if (const char* wanted = std::getenv("PYLLM_ISA")) cpu::set_isa(wanted);
  m.def("synchronize", &synchronize, py::call_guard<py::gil_scoped_release>());
#if PYLLM_WITH_CUDA
  m.def("_set_wgmma", [](bool wanted) { cuda::wgmma_wanted = wanted; });
  if (const char* wanted = std::getenv("PYLLM_CUDA_WGMMA")) {
    check(std::string(wanted) == "0" || std::string(wanted) == "1", "PYLLM_CUDA_WGMMA must be 0 or 1, but got ",
          wanted);
    cuda::wgmma_wanted = wanted[0] == '1';
  }
#endif
#if PYLLM_EMULATE_CUDA
  m.def("_emulate_cuda", [](bool on) { cuda::emulating = on; });
  m.def("_emulated_launches", &cuda::emulated_launches);
  m.def("_emulated_products", &cuda::emulated_products);
  m.def("emulating_cuda", [] { return cuda::emulating; });
#else
  m.def("emulating_cuda", [] { return false; });
#endif

  m.def("recording", [] { return recording != nullptr; });
  m.def("begin_rows", [](const TensorView& offsets, int64_t at, const TensorView& x, const TensorView& out) {
    check(recording, "[begin_rows] a step must be recorded");
    recording->begin_rows(offsets, at, x, out);
  });
  m.def("keep_memory", [](const TensorView& t) {
    check(recording, "[keep_memory] a step must be recorded");
    recording->keep_memory(t);
  });
  m.def("mark_rows", [](const TensorView& t) {
    if (recording) recording->mark_rows(t);
  });
  m.def("end_rows", [] {
    if (recording) recording->end_rows();
  });
  m.def("row_scopes", [] { return recording ? recording->row_scopes() : 0; });
  py::class_<Program>(m, "Program")
      .def(py::init<>())
      .def("record", [](Program& program, bool on) { recording = on ? &program : nullptr; })
      .def(
          "run", [](const Program& program) { program.run(raise_signals); }, py::call_guard<py::gil_scoped_release>())
      .def("generate", &Program::generate, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("steps_done", &Program::steps_done)
      .def_property_readonly("steps_run", &Program::steps_run)
      .def_property_readonly("ops", &Program::ops)
      .def_property_readonly("unfit", &Program::unfit);

  def(m, "activation_forward", &ops::activation_forward);
  def(m, "activation_backward", &ops::activation_backward);
  def(m, "adamw", &ops::adamw);
  def(m, "attention_forward", &ops::attention_forward);
  def(m, "attention_backward", &ops::attention_backward);
  m.def("checksum", &ops::checksum, py::call_guard<py::gil_scoped_release>());
  def(m, "cross_entropy_forward", &ops::cross_entropy_forward);
  def(m, "cross_entropy_backward", &ops::cross_entropy_backward);
  def(m, "linear_cross_entropy", &ops::linear_cross_entropy);
  def(m, "elementwise", &ops::elementwise);
  def(m, "embedding_forward", &ops::embedding_forward);
  def(m, "embedding_backward", &ops::embedding_backward);
  m.def("multiply_add", &ops::multiply_add, py::call_guard<py::gil_scoped_release>());
  def(m, "read", &ops::read);
  def(m, "norm_forward", &ops::norm_forward);
  def(m, "norm_backward", &ops::norm_backward);
  def(m, "linear", &ops::linear);
  m.def("pack_linear", &ops::pack_linear, py::call_guard<py::gil_scoped_release>());  // before a step, not in it
  m.def("panel_width", &panel_width);
  def(m, "matmul", &ops::matmul);
  def(m, "column_sum", &ops::column_sum);
  m.def("quantized_panel_width", &ops::quantized_panel_width);
  m.def("pack_quantized", &ops::pack_quantized, py::call_guard<py::gil_scoped_release>());
  m.def("check_quantized", &ops::check_quantized, py::call_guard<py::gil_scoped_release>());
  def(m, "quantized_linear", &ops::quantized_linear);
  def(m, "quantized_linear_backward", &ops::quantized_linear_backward);
  def(m, "quantized_embedding", &ops::quantized_embedding);
  def(m, "next_positions", &ops::next_positions);
  m.def("page_tile", &ops::page_tile);
  def(m, "prefer_large_pages", &ops::prefer_large_pages);
  m.def("give_back_file_pages", &ops::give_back_file_pages);
  def(m, "write_pages", &ops::write_pages);
  def(m, "recurrent_forward", &ops::recurrent_forward);
  def(m, "recurrent_cell", &ops::recurrent_cell);
  def(m, "recurrent_backward", &ops::recurrent_backward);
  def(m, "recurrent_steps", &ops::recurrent_steps);
  def(m, "recurrent_steps_backward", &ops::recurrent_steps_backward);
  m.def("unpack_blocks", &ops::unpack_blocks, py::call_guard<py::gil_scoped_release>());
  def(m, "rope", &ops::rope);
  def(m, "route", &ops::route);
  def(m, "route_backward", &ops::route_backward);
  def(m, "sample", &ops::sample);
  m.def("wkv_chunk", &ops::wkv_chunk);
  def(m, "wkv_forward", &ops::wkv_forward);
  def(m, "wkv_backward", &ops::wkv_backward);
}

// The Python module `tolaria._C`: importing it runs the registrations, and one op has an entrance of its own here.
//
// `judge` is governor_step_ for one governor, called once a training step. Between two steps nothing of torch's argument
// parser, of the schema and of the boxed stack is in a cache any more, which is what a call through torch.ops costs: 22 us
// of a 3 ms step against 16 us through this entrance (Zen 3). It hands its arguments to the op's typed handle. The look at
// the optimizers' groups is here for the same reason: 2 us instead of 8.
#include <Python.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#ifdef TOLARIA_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <optional>

#include "math/governor_fields.h"
#include "ops.h"

namespace tolaria {
namespace {

const at::Tensor& as_tensor(PyObject* value, const char* name) {
  TORCH_CHECK_TYPE(THPVariable_Check(value), name, ": expected a tensor, got ", Py_TYPE(value)->tp_name);
  return THPVariable_Unpack(value);
}

std::optional<at::Tensor> as_optional(PyObject* value, const char* name) {
  return value == Py_None ? std::nullopt : std::optional<at::Tensor>(as_tensor(value, name));
}

// Whether the host has something to do: an order, or an event after the `told` it knows. Of a governor that is not in
// CPU memory only the mailbox can tell, in time.
bool needs_host(const at::Tensor& state, double told) {
  if (!state.is_cpu() || state.size(1) != 1) return true;
  const double* column = state.const_data_ptr<double>();
  const auto field = [&](int f) { return column[f * state.stride(0)]; };
  return field(math::field::restore_order) != 0.0 || field(math::field::capture_order_0) >= 0.0 ||
         field(math::field::events) != told;
}

// Whether the groups of these optimizers have not the sizes they had; also where something about them is odd.
bool has_grown(PyObject* optimizers, PyObject* sizes) {
  static PyObject* const param_groups = PyUnicode_InternFromString("param_groups");
  static PyObject* const params = PyUnicode_InternFromString("params");
  Py_ssize_t known = 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(optimizers); ++i) {
    THPObjectPtr groups(PyObject_GetAttr(PyList_GET_ITEM(optimizers, i), param_groups));
    if (!groups || !PyList_Check(groups.get())) return true;
    for (Py_ssize_t j = 0; j < PyList_GET_SIZE(groups.get()); ++j, ++known) {
      PyObject* group = PyList_GET_ITEM(groups.get(), j);
      PyObject* members = PyDict_Check(group) ? PyDict_GetItemWithError(group, params) : nullptr;
      if (members == nullptr || !PyList_Check(members) || known >= PyList_GET_SIZE(sizes)) return true;
      if (PyLong_AsSsize_t(PyList_GET_ITEM(sizes, known)) != PyList_GET_SIZE(members)) return true;
    }
  }
  return known != PyList_GET_SIZE(sizes);
}

// judge(state, config, loss, nonfinite, mailbox, gradient, told, optimizers, sizes) -> bool
PyObject* judge(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 9, "judge: expected 9 arguments, got ", count);
  TORCH_CHECK_TYPE(PyList_Check(args[7]) && PyList_Check(args[8]), "optimizers, sizes: expected two lists");
  static const auto governor_step = c10::Dispatcher::singleton()
                                        .findSchemaOrThrow("tolaria::governor_step_", "")
                                        .typed<decltype(governor_step_cpu)>();
  at::Tensor state = as_tensor(args[0], "state");
  const double told = PyFloat_AsDouble(args[6]);
  if (PyErr_Occurred()) return nullptr;
  governor_step.call(state, as_tensor(args[1], "config"), as_tensor(args[2], "loss"), as_optional(args[3], "nonfinite"),
                     std::nullopt, as_optional(args[4], "mailbox"), as_optional(args[5], "gradient"), std::nullopt);
  const bool must_act = needs_host(state, told) || has_grown(args[7], args[8]);
  PyErr_Clear();  // what was odd, Python finds again and names
  return PyBool_FromLong(must_act);
  END_HANDLE_TH_ERRORS
}

// recording(device) -> the number of the CUDA graph recording that the device's current stream takes part in, 0 for none
PyObject* tell_recording(PyObject*, PyObject* device) {
  HANDLE_TH_ERRORS
  [[maybe_unused]] const long index = PyLong_AsLong(device);
  if (PyErr_Occurred()) return nullptr;
  unsigned long long id = 0;
#ifdef TOLARIA_WITH_CUDA
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const auto stream = c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(index));
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &id));
  if (status == cudaStreamCaptureStatusNone) id = 0;
#endif
  return PyLong_FromUnsignedLongLong(id);
  END_HANDLE_TH_ERRORS
}

// last_level_cache() -> bytes
PyObject* tell_last_level_cache(PyObject*, PyObject*) { return PyLong_FromLongLong(last_level_cache()); }

// stream_above() -> bytes
PyObject* tell_stream_above(PyObject*, PyObject*) { return PyLong_FromLongLong(stream_above()); }

// set_stream_above(bytes) -> bytes
PyObject* change_stream_above(PyObject*, PyObject* bytes) {
  const int64_t value = PyLong_AsLongLong(bytes);
  return PyErr_Occurred() ? nullptr : PyLong_FromLongLong(set_stream_above(value));
}

}  // namespace
}  // namespace tolaria

extern "C" PyObject* PyInit__C() {
  static PyMethodDef methods[] = {
      {"judge", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&tolaria::judge)), METH_FASTCALL, nullptr},
      {"recording", &tolaria::tell_recording, METH_O, nullptr},
      {"last_level_cache", &tolaria::tell_last_level_cache, METH_NOARGS, nullptr},
      {"set_stream_above", &tolaria::change_stream_above, METH_O, nullptr},
      {"stream_above", &tolaria::tell_stream_above, METH_NOARGS, nullptr},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

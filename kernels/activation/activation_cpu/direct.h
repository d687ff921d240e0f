// Calls from Python that go around PyTorch's dispatcher, of which the way in and out takes longer than one row does.
//
// Each function here takes Python's tensors and gives the op's result, or None where the op must be called: where a
// gradient is asked for, where somebody watches (modes, transforms, a trace, the profiler), and where a tensor is anything
// but elements side by side on the right device. Where a tensor lies PyTorch tells through DLPack's table of C functions
// (Tensor.__dlpack_c_exchange_api__); without it, and before `prepare`, every answer is None.

#pragma once

#include <Python.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <exception>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

// Of the limited API since Python 3.10; Python has had it since 3.7.
#if !defined(METH_FASTCALL)
#define METH_FASTCALL 0x0080
#endif

namespace kernelhub {
namespace direct {

// DLPack 1: https://dmlc.github.io/dlpack/latest/c_api.html
struct DLTensor {
  void* data;
  int32_t device_type;
  int32_t device;
  int32_t dims;
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* sizes;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* before;
  void* allocate;
  void* managed_from_python;
  void* managed_to_python;
  int (*tensor_from_python)(void* object, DLTensor* to); // 0, or -1 with a Python error
  void* current_stream;
};

#if defined(CUDA_KERNEL)
constexpr int32_t DEVICE_TYPE = 2;
constexpr int64_t MOST = INT64_MAX;
#else
constexpr int32_t DEVICE_TYPE = 1;
// Elements up to which one thread does all; with more, the op's microsecond does not count.
constexpr int64_t MOST = 16384;
#endif

// A function of Python's without arguments, called by its C function where it has one: 15 to 30 ns less.
struct Function {
  PyObject* object = nullptr;
  PyCFunction plain = nullptr;
  PyObject* self = nullptr;

  Function() = default;
  explicit Function(PyObject* given) : object(given) {
    if (PyCFunction_Check(given) && PyCFunction_GetFlags(given) == METH_NOARGS) {
      plain = PyCFunction_GetFunction(given);
      self = PyCFunction_GetSelf(given);
    }
  }

  PyObject* operator()() const { return plain != nullptr ? plain(self, nullptr) : PyObject_CallObject(object, nullptr); }
};

// What `prepare` was given.
struct Torch {
  const ExchangeApi* api = nullptr;
  PyObject* tensor = nullptr;
  PyObject* parameter = nullptr;
  PyObject* empty_like = nullptr;
  PyCFunction is_neg = nullptr;     // of a tensor
  PyObject* forward_ad = nullptr;   // the names of torch.autograd.forward_ad
  PyObject* profiler = nullptr;     // those of torch.autograd.profiler
  PyObject* level = nullptr;        // "_current_level"
  PyObject* enabled = nullptr;      // "_is_profiler_enabled"
  PyObject* requires_grad = nullptr;
  std::array<Function, 4> watchers; // return something false where nobody watches
};

inline Torch& torch() {
  static Torch found;
  return found;
}

// prepare(capsule, Tensor, Parameter, empty_like, a tensor's is_neg, names of forward_ad, names of profiler, watcher, ...):
// once, before all calls. What it is given stays alive. Returns whether there will be answers.
inline PyObject* prepare(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Torch& to = torch();
  constexpr Py_ssize_t FIXED = 7;
  if (count != FIXED + static_cast<Py_ssize_t>(to.watchers.size())) {
    PyErr_SetString(PyExc_TypeError, "prepare: another number of arguments");
    return nullptr;
  }
  constexpr const char* name = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(given[0], name)) {
    Py_RETURN_FALSE;
  }
  const auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(given[0], name));
  const Function is_neg(given[4]);
  if (api->major != 1 || api->tensor_from_python == nullptr || is_neg.plain == nullptr) {
    Py_RETURN_FALSE;
  }
  for (Py_ssize_t at = 0; at < count; ++at) {
    Py_INCREF(given[at]);
  }
  to.tensor = given[1];
  to.parameter = given[2];
  to.empty_like = given[3];
  to.is_neg = is_neg.plain;
  to.forward_ad = given[5];
  to.profiler = given[6];
  for (size_t at = 0; at < to.watchers.size(); ++at) {
    to.watchers[at] = Function(given[FIXED + at]);
  }
  to.level = PyUnicode_InternFromString("_current_level");
  to.enabled = PyUnicode_InternFromString("_is_profiler_enabled");
  to.requires_grad = PyUnicode_InternFromString("requires_grad");
  to.api = api;
  Py_RETURN_TRUE;
}

// Whether a Python call came back with something false; any other end is not. Takes the result's reference.
inline bool is_false(PyObject* result) {
  if (result == nullptr) {
    PyErr_Clear();
    return false;
  }
  const int truth = result == Py_False ? 0 : PyObject_IsTrue(result);
  Py_DECREF(result);
  if (truth < 0) {
    PyErr_Clear();
  }
  return truth == 0;
}

// A plain tensor whose elements lie side by side, on a device of the right kind, of one of three dtypes, not empty.
struct Dense {
  char* data;
  int64_t dims;
  const int64_t* sizes;
  int64_t count;
  int32_t device;
  int dtype; // a Dtype
  int64_t bytes; // of an element

  int64_t last() const { return sizes[dims - 1]; }
  bool on_same(const Dense& other) const { return device == other.device && dtype == other.dtype; }
  bool like(const Dense& other) const {
    return on_same(other) && dims == other.dims && std::memcmp(sizes, other.sizes, sizeof(*sizes) * dims) == 0;
  }
};

inline bool read(PyObject* object, Dense& to) {
  const Torch& known = torch();
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (known.api == nullptr || (type != known.tensor && type != known.parameter)) {
    return false;
  }
  DLTensor of;
  if (known.api->tensor_from_python(object, &of) != 0) {
    PyErr_Clear();
    return false;
  }
  constexpr uint8_t FLOAT = 2, BFLOAT = 4;
  if (of.device_type != DEVICE_TYPE || of.data == nullptr || of.lanes != 1 || of.dims < 1) {
    return false;
  }
  if (of.code == FLOAT && of.bits == 32) {
    to.dtype = 0;
  } else if (of.code == BFLOAT && of.bits == 16) {
    to.dtype = 1;
  } else if (of.code == FLOAT && of.bits == 16) {
    to.dtype = 2;
  } else {
    return false;
  }
  int64_t count = 1;
  for (int32_t dim = of.dims - 1; dim >= 0; --dim) {
    if (of.strides != nullptr && of.strides[dim] != count) {
      return false;
    }
    count *= of.sizes[dim];
  }
  if (count == 0 || count > MOST) {
    return false;
  }
  to.data = static_cast<char*>(of.data) + of.byte_offset;
  to.dims = of.dims;
  to.sizes = of.sizes;
  to.count = count;
  to.device = of.device;
  to.bytes = of.bits / 8;
  return true;
}

// Whether nobody could tell a direct call with these tensors, which `read` took, from one of the op.
template <size_t COUNT>
bool unseen(const std::array<PyObject*, COUNT>& tensors) {
  const Torch& known = torch();
  if (aoti_torch_grad_mode_is_enabled()) {
    for (PyObject* tensor : tensors) {
      if (tensor != nullptr && !is_false(PyObject_GetAttr(tensor, known.requires_grad))) {
        return false;
      }
    }
  }
  for (const Function& watcher : known.watchers) {
    if (!is_false(watcher())) {
      return false;
    }
  }
  // Both borrowed; the level is -1 outside forward-mode AD.
  PyObject* profiled = PyDict_GetItemWithError(known.profiler, known.enabled);
  PyObject* level = PyDict_GetItemWithError(known.forward_ad, known.level);
  if (profiled != Py_False || level == nullptr || PyLong_AsLong(level) != -1) {
    PyErr_Clear();
    return false;
  }
  for (PyObject* tensor : tensors) {
    if (tensor != nullptr && !is_false(known.is_neg(tensor, nullptr))) {
      return false;
    }
  }
  return true;
}

// A new tensor as one that `read` took; null with a Python error.
inline PyObject* new_like(PyObject* tensor, Dense& to) {
  PyObject* made = PyObject_CallFunctionObjArgs(torch().empty_like, tensor, nullptr);
  if (made != nullptr && !read(made, to)) {
    Py_DECREF(made);
    PyErr_SetString(PyExc_RuntimeError, "torch.empty_like made another kind of tensor than it was given");
    return nullptr;
  }
  return made;
}

inline bool number(PyObject* object, double& to) {
  if (!PyFloat_Check(object)) {
    return false;
  }
  to = PyFloat_AsDouble(object);
  return true;
}

inline bool number(PyObject* object, int64_t& to) {
  if (!PyLong_Check(object)) {
    return false;
  }
  to = PyLong_AsLongLong(object);
  if (to == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    return false;
  }
  return true;
}

// Runs it; false with a Python error where it threw. A launch may wait for the GPU, and other threads go on meanwhile.
template <typename Run>
bool ran(const Run& run) {
  char message[2048] = "";
  bool failed = false;
#if defined(CUDA_KERNEL)
  PyThreadState* state = PyEval_SaveThread();
#endif
  try {
    run();
  } catch (const std::exception& error) {
    failed = true;
    std::strncpy(message, error.what(), sizeof(message) - 1);
  }
#if defined(CUDA_KERNEL)
  PyEval_RestoreThread(state);
#endif
  if (failed) {
    PyErr_SetString(PyExc_RuntimeError, message);
  }
  return !failed;
}

// The module of an extension, as REGISTER_EXTENSION makes it, but with functions.
#define DIRECT_JOIN_(A, B) A##B
#define DIRECT_JOIN(A, B) DIRECT_JOIN_(A, B)
#define DIRECT_TEXT_(A) #A
#define DIRECT_TEXT(A) DIRECT_TEXT_(A)
#define REGISTER_EXTENSION_WITH(NAME, FUNCTIONS)                                                    \
  PyMODINIT_FUNC DIRECT_JOIN(PyInit_, NAME)(void) {                                                 \
    static PyModuleDef_Slot slots[] = {{0, nullptr}};                                               \
    static PyModuleDef definition = {                                                               \
        PyModuleDef_HEAD_INIT, DIRECT_TEXT(NAME), nullptr, 0, FUNCTIONS, slots, nullptr, nullptr, nullptr}; \
    return PyModuleDef_Init(&definition);                                                           \
  }

using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

inline PyMethodDef function(const char* name, Fast fast) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fast)), METH_FASTCALL, nullptr};
}

} // namespace direct
} // namespace kernelhub

#include "norm_cpu/direct.h" // Python's header comes first

#include <torch/csrc/stable/library.h>

#include "norm_cpu/norm.h"
#include "registration.h"

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def("rms_norm(Tensor x, Tensor weight, float eps, int form) -> Tensor");
  ops.def(
      "rms_norm_backward(Tensor grad, Tensor? sum_grad, Tensor x, Tensor weight, float eps, int form, "
      "bool needs_weight) -> (Tensor, Tensor)");
  ops.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, int form) -> (Tensor, Tensor)");
  ops.def("rms_norm_gated(Tensor x, Tensor gate, Tensor weight, float eps, int form, int kind) -> Tensor");
  ops.def(
      "rms_norm_gated_backward(Tensor grad, Tensor x, Tensor gate, Tensor weight, float eps, int kind) "
      "-> (Tensor, Tensor, Tensor)");
  ops.def("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor");
  ops.def(
      "layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, float eps, bool needs_weight, bool needs_bias) "
      "-> (Tensor, Tensor, Tensor)");
#if defined(CPU_KERNEL)
  ops.def("use_level(int level) -> int");
#endif
}

// A build is for one of them, and its sources define the functions.
#if defined(CUDA_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) {
#else
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
#endif
  ops.impl("rms_norm", TORCH_BOX(&kernelhub::rms_norm));
  ops.impl("rms_norm_backward", TORCH_BOX(&kernelhub::rms_norm_backward));
  ops.impl("add_rms_norm", TORCH_BOX(&kernelhub::add_rms_norm));
  ops.impl("rms_norm_gated", TORCH_BOX(&kernelhub::rms_norm_gated));
  ops.impl("rms_norm_gated_backward", TORCH_BOX(&kernelhub::rms_norm_gated_backward));
  ops.impl("layer_norm", TORCH_BOX(&kernelhub::layer_norm));
  ops.impl("layer_norm_backward", TORCH_BOX(&kernelhub::layer_norm_backward));
}

#if defined(CPU_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("use_level", TORCH_BOX(&kernelhub::use_level));
}
#endif

namespace kernelhub {
namespace {

using namespace direct;

// x and what is of its shape, weight and bias where there are any, as far as they fit together.
struct Operands {
  Dense x, other, weight, bias;
  Contiguous of{};

  bool read_all(PyObject* x_object, PyObject* residual, PyObject* weight_object, PyObject* bias_object) {
    if (!read(x_object, x) || (residual != nullptr && !(read(residual, other) && other.like(x)))) {
      return false;
    }
    return read_row(weight_object, weight, of.weight) && read_row(bias_object, bias, of.bias);
  }

  // Fills in what is known without the results.
  void begin(double eps) {
    of.x = x.data;
    of.n = x.last();
    of.rows = x.count / of.n;
    of.eps = eps;
    of.dtype = x.dtype;
    of.device = x.device;
  }

 private:
  bool read_row(PyObject* object, Dense& row, const void*& data) {
    if (object == nullptr) {
      return true;
    }
    if (!read(object, row) || row.dims != 1 || row.count != x.last() || !row.on_same(x)) {
      return false;
    }
    data = row.data;
    return true;
  }
};

constexpr int64_t FORMS = 3;

// (x, weight, eps, form) -> y
PyObject* direct_rms_norm(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Operands operands;
  Contiguous& of = operands.of;
  double eps;
  int64_t form;
  if (count != 4 || !operands.read_all(given[0], nullptr, given[1], nullptr) || !number(given[2], eps) ||
      !number(given[3], form) || form < 0 || form >= FORMS || !unseen<2>({given[0], given[1]})) {
    Py_RETURN_NONE;
  }
  operands.begin(eps);
  Dense y;
  PyObject* made = new_like(given[0], y);
  if (made == nullptr) {
    return nullptr;
  }
  of.y = y.data;
  if (!ran([&] { run_rms_norm(of, form); })) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}

// (x, residual, weight, eps, form) -> (y, sum)
PyObject* direct_add_rms_norm(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Operands operands;
  Contiguous& of = operands.of;
  double eps;
  int64_t form;
  if (count != 5 || !operands.read_all(given[0], given[1], given[2], nullptr) || !number(given[3], eps) ||
      !number(given[4], form) || form < 0 || form >= FORMS || !unseen<3>({given[0], given[1], given[2]})) {
    Py_RETURN_NONE;
  }
  operands.begin(eps);
  of.residual = operands.other.data;
  Dense y, sum;
  PyObject* made = new_like(given[0], y);
  PyObject* made_sum = made != nullptr ? new_like(given[0], sum) : nullptr;
  PyObject* both = nullptr;
  if (made_sum != nullptr) {
    of.y = y.data;
    of.sum = sum.data;
    if (ran([&] { run_rms_norm(of, form); })) {
      both = PyTuple_Pack(2, made, made_sum);
    }
  }
  Py_XDECREF(made);
  Py_XDECREF(made_sum);
  return both;
}

// Whether a normalized_shape, None or a tuple, is that of the last dimension.
bool is_last(PyObject* shape, const Dense& x) {
  if (shape == Py_None) {
    return true;
  }
  int64_t size;
  return PyTuple_Check(shape) && PyTuple_Size(shape) == 1 && number(PyTuple_GetItem(shape, 0), size) && size == x.last();
}

// (x, weight or None, bias or None, eps[, normalized_shape or None]) -> y
PyObject* direct_layer_norm(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Operands operands;
  Contiguous& of = operands.of;
  double eps;
  if (count != 4 && count != 5) {
    Py_RETURN_NONE;
  }
  PyObject *weight = given[1] == Py_None ? nullptr : given[1], *bias = given[2] == Py_None ? nullptr : given[2];
  if (!operands.read_all(given[0], nullptr, weight, bias) || !number(given[3], eps) ||
      (count == 5 && !is_last(given[4], operands.x)) || !unseen<3>({given[0], weight, bias})) {
    Py_RETURN_NONE;
  }
  operands.begin(eps);
  Dense y;
  PyObject* made = new_like(given[0], y);
  if (made == nullptr) {
    return nullptr;
  }
  of.y = y.data;
  if (!ran([&] { run_layer_norm(of); })) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}

PyMethodDef functions[] = {
    function("prepare", prepare),
    function("rms_norm", direct_rms_norm),
    function("add_rms_norm", direct_add_rms_norm),
    function("layer_norm", direct_layer_norm),
    {nullptr, nullptr, 0, nullptr},
};

} // namespace
} // namespace kernelhub

REGISTER_EXTENSION_WITH(TORCH_EXTENSION_NAME, kernelhub::functions)

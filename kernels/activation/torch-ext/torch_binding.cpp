#include "activation_cpu/direct.h" // Python's header comes first

#include <torch/csrc/stable/library.h>

#include "activation_cpu/activation.h"
#include "registration.h"

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def("apply(Tensor x, int function) -> Tensor");
  ops.def("apply_backward(Tensor grad, Tensor x, int function) -> Tensor");
  ops.def("multiply(Tensor a, Tensor b, int function) -> Tensor");
  ops.def("multiply_backward(Tensor grad, Tensor a, Tensor b, int function) -> (Tensor, Tensor)");
  ops.def("multiply_backward_result(Tensor grad, Tensor a, Tensor b, int function) -> (Tensor, Tensor, Tensor)");
  ops.def("halves(Tensor x, int function) -> Tensor");
  ops.def("halves_backward(Tensor grad, Tensor x, int function) -> Tensor");
  ops.def("halves_backward_result(Tensor grad, Tensor x, int function) -> (Tensor, Tensor)");
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
  ops.impl("apply", TORCH_BOX(&kernelhub::apply));
  ops.impl("apply_backward", TORCH_BOX(&kernelhub::apply_backward));
  ops.impl("multiply", TORCH_BOX(&kernelhub::multiply));
  ops.impl("multiply_backward", TORCH_BOX(&kernelhub::multiply_backward));
  ops.impl("multiply_backward_result", TORCH_BOX(&kernelhub::multiply_backward_result));
  ops.impl("halves", TORCH_BOX(&kernelhub::halves));
  ops.impl("halves_backward", TORCH_BOX(&kernelhub::halves_backward));
  ops.impl("halves_backward_result", TORCH_BOX(&kernelhub::halves_backward_result));
}

#if defined(CPU_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("use_level", TORCH_BOX(&kernelhub::use_level));
}
#endif

namespace kernelhub {
namespace {

using namespace direct;

constexpr int64_t FUNCTIONS = 4;

// f(a), or with b f(a) * b.
PyObject* forward(PyObject* a, PyObject* b, PyObject* function) {
  Dense from, other;
  int64_t which;
  if (!read(a, from) || (b != nullptr && !(read(b, other) && other.like(from))) || !number(function, which) ||
      which < 0 || which >= FUNCTIONS || !unseen<2>({a, b})) {
    Py_RETURN_NONE;
  }
  Dense y;
  PyObject* made = new_like(a, y);
  if (made == nullptr) {
    return nullptr;
  }
  const Contiguous of{from.data, b != nullptr ? other.data : nullptr, y.data, from.count, from.dtype, from.device};
  if (!ran([&] { run_forward(of, which); })) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}

// (x, function) -> y
PyObject* direct_apply(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 2) {
    Py_RETURN_NONE;
  }
  return forward(given[0], nullptr, given[1]);
}

// (a, b, function) -> y
PyObject* direct_multiply(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 3) {
    Py_RETURN_NONE;
  }
  return forward(given[0], given[1], given[2]);
}

PyMethodDef functions[] = {
    function("prepare", prepare),
    function("apply", direct_apply),
    function("multiply", direct_multiply),
    {nullptr, nullptr, 0, nullptr},
};

} // namespace
} // namespace kernelhub

REGISTER_EXTENSION_WITH(TORCH_EXTENSION_NAME, kernelhub::functions)

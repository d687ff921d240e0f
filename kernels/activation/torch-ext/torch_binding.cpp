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

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)

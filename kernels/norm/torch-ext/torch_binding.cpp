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

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)

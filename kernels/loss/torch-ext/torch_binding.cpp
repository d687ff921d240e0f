#include <torch/csrc/stable/library.h>

#include "loss_cpu/loss.h"
#include "registration.h"

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def(
      "cross_entropy(Tensor logits, Tensor labels, int ignore_index, float label_smoothing, float z_loss) "
      "-> (Tensor, Tensor)");
  ops.def(
      "cross_entropy_backward(Tensor grad, Tensor logits, Tensor labels, Tensor sums, int ignore_index, "
      "float label_smoothing, float z_loss) -> Tensor");
  ops.def(
      "cross_entropy_gradient_(Tensor(a!) logits, Tensor labels, Tensor scale, int ignore_index, "
      "float label_smoothing, float z_loss) -> Tensor");
#if defined(CPU_KERNEL)
  ops.def("use_level(int level) -> int");
#else
  ops.def("scale_(Tensor(a!) x, Tensor by) -> ()");
#endif
}

// A build is for one of them, and its sources define the functions.
#if defined(CUDA_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) {
#else
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
#endif
  ops.impl("cross_entropy", TORCH_BOX(&kernelhub::cross_entropy));
  ops.impl("cross_entropy_backward", TORCH_BOX(&kernelhub::cross_entropy_backward));
  ops.impl("cross_entropy_gradient_", TORCH_BOX(&kernelhub::cross_entropy_gradient_));
#if defined(CUDA_KERNEL)
  ops.impl("scale_", TORCH_BOX(&kernelhub::scale_));
#endif
}

#if defined(CPU_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("use_level", TORCH_BOX(&kernelhub::use_level));
}
#endif

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)

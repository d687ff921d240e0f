#include <torch/csrc/stable/library.h>

#include "registration.h"
#include "rotary_cpu/rotary.h"

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def(
      "rotate(Tensor q, Tensor k, Tensor cos, Tensor sin, int heads_dim, int rotary_dim, int form) "
      "-> (Tensor, Tensor)");
#if defined(CUDA_KERNEL)
  ops.def("tables(Tensor inv_freq, Tensor positions, float scale, int dtype, int layout) -> (Tensor, Tensor)");
#endif
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
  ops.impl("rotate", TORCH_BOX(&kernelhub::rotate));
#if defined(CUDA_KERNEL)
  ops.impl("tables", TORCH_BOX(&kernelhub::tables));
#endif
}

#if defined(CPU_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("use_level", TORCH_BOX(&kernelhub::use_level));
}
#endif

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)

#include <torch/csrc/stable/library.h>

#include "poly/poly.h"
#include "registration.h"

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def("square(Tensor input) -> Tensor");
  ops.def("cube(Tensor input) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
  ops.impl("square", TORCH_BOX(&square));
  ops.impl("cube", TORCH_BOX(&cube));
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)

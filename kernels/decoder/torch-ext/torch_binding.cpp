#include <torch/csrc/stable/library.h>

#include "registration.h"

// A build is for one of them.
#if defined(CUDA_KERNEL)
#include "decoder_cuda/decoder.h"

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def("gated_product(Tensor x, Tensor gate, Tensor up, int function) -> Tensor");
  ops.def("gated_product_parts(Tensor x, Tensor gate, Tensor up, int function) -> (Tensor, Tensor, Tensor)");
  ops.def(
      "rotary_projections(Tensor x, Tensor q, Tensor? q_bias, Tensor k, Tensor? k_bias, Tensor v, Tensor? v_bias, "
      "Tensor cos, Tensor sin, int head_dim) -> (Tensor, Tensor, Tensor)");
  ops.def(
      "gated_gradients(Tensor grad, Tensor weight, Tensor gate, Tensor up, int function, bool result) "
      "-> (Tensor, Tensor, Tensor)");
  ops.def("add_product(Tensor x, Tensor weight, Tensor residual) -> Tensor");
  ops.def("added_mlp(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor residual, int function) -> Tensor");
  ops.def(
      "added_mlp_parts(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor residual, int function) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) {
  ops.impl("gated_product", TORCH_BOX(&kernelhub::gated_product));
  ops.impl("gated_product_parts", TORCH_BOX(&kernelhub::gated_product_parts));
  ops.impl("rotary_projections", TORCH_BOX(&kernelhub::rotary_projections));
  ops.impl("gated_gradients", TORCH_BOX(&kernelhub::gated_gradients));
  ops.impl("add_product", TORCH_BOX(&kernelhub::add_product));
  ops.impl("added_mlp", TORCH_BOX(&kernelhub::added_mlp));
  ops.impl("added_mlp_parts", TORCH_BOX(&kernelhub::added_mlp_parts));
}
#endif

#if defined(CPU_KERNEL)
#include "decoder_cpu/decoder.h"

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def(
      "gated_mlp(Tensor x, Tensor? residual, Tensor? norm, float eps, int form, Tensor gate, Tensor? gate_bias, "
      "Tensor? up, Tensor? up_bias, Tensor down, Tensor? down_bias, int function) -> Tensor");
  ops.def("use_level(int level) -> int");
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
  ops.impl("gated_mlp", TORCH_BOX(&kernelhub::gated_mlp));
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("use_level", TORCH_BOX(&kernelhub::use_level));
}
#endif

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)

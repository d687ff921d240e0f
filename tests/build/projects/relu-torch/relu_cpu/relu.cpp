#include <ATen/core/Tensor.h>

void relu(at::Tensor& out, const at::Tensor& input) {
  TORCH_CHECK(out.numel() == input.numel(), "relu: out and input have different sizes");
  const float* from = input.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  for (int64_t at = 0; at < input.numel(); ++at) {
    to[at] = from[at] > 0 ? from[at] : 0;
  }
}

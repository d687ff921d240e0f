#include <algorithm>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

torch::stable::Tensor relu(const torch::stable::Tensor& input) {
  STD_TORCH_CHECK(input.scalar_type() == torch::headeronly::ScalarType::Float, "relu takes float32 tensors");
  auto dense = torch::stable::contiguous(input);
  auto output = torch::stable::empty_like(dense);
  const auto* from = static_cast<const float*>(dense.data_ptr());
  auto* to = static_cast<float*>(output.data_ptr());
  for (int64_t at = 0; at < dense.numel(); ++at) {
    to[at] = std::max(from[at], 0.0f);
  }
  return output;
}

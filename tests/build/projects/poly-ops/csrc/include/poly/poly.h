#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

torch::stable::Tensor square(const torch::stable::Tensor& input);
torch::stable::Tensor cube(const torch::stable::Tensor& input);

template <typename F>
torch::stable::Tensor each(const torch::stable::Tensor& input, F&& function) {
  auto output = torch::stable::empty_like(input);
  const auto* from = static_cast<const float*>(input.data_ptr());
  auto* to = static_cast<float*>(output.data_ptr());
  for (int64_t at = 0; at < input.numel(); ++at) {
    to[at] = function(from[at]);
  }
  return output;
}

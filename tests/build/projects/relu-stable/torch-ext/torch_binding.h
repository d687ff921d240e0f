#pragma once

#include <torch/csrc/stable/tensor.h>

torch::stable::Tensor relu(const torch::stable::Tensor& input);

#pragma once

#include <cstdint>
#include <optional>

#include <torch/csrc/stable/tensor.h>

namespace kernelhub {

using torch::stable::Tensor;

// down(f(gate(n)) * up(n)), with n the RMS norm of x, or x where there is no norm's weight. With a residual, x + residual
// stands for x, and is added to the result. Without up, gate's weight and bias are those of both, one behind the other.
Tensor gated_mlp(
    const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& norm, double eps, int64_t form,
    const Tensor& gate, const std::optional<Tensor>& gate_bias, const std::optional<Tensor>& up,
    const std::optional<Tensor>& up_bias, const Tensor& down, const std::optional<Tensor>& down_bias, int64_t function);

// From now on no wider instructions than those of the level (level.h), for tests; returns the level in use.
int64_t use_level(int64_t level);

} // namespace kernelhub

#pragma once

#include <cstdint>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace kernelhub {

using torch::stable::Tensor;

// The losses, float32, of the labels' shape, 0 where they are ignored; and for each row what its gradient is made of.
std::tuple<Tensor, Tensor> cross_entropy(
    const Tensor& logits, const Tensor& labels, int64_t ignore_index, double label_smoothing, double z_loss);

Tensor cross_entropy_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& labels, const Tensor& sums, int64_t ignore_index,
    double label_smoothing, double z_loss);

// Both at once, where the logits are needed no more: they become the gradient of sum(scale * losses).
Tensor cross_entropy_gradient_(
    const Tensor& logits, const Tensor& labels, const Tensor& scale, int64_t ignore_index, double label_smoothing,
    double z_loss);

// x times one number, in float32, in place.
void scale_(const Tensor& x, const Tensor& by);

// From now on no wider instructions than those of the level (level.h), for tests; returns the level in use.
int64_t use_level(int64_t level);

} // namespace kernelhub

#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace kernelhub {

using torch::stable::Tensor;

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, int64_t form);

std::tuple<Tensor, Tensor> add_rms_norm(
    const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, int64_t form);

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& grad, const std::optional<Tensor>& sum_grad, const Tensor& x, const Tensor& weight, double eps,
    int64_t form, bool needs_weight);

Tensor rms_norm_gated(
    const Tensor& x, const Tensor& gate, const Tensor& weight, double eps, int64_t form, int64_t kind);

std::tuple<Tensor, Tensor, Tensor> rms_norm_gated_backward(
    const Tensor& grad, const Tensor& x, const Tensor& gate, const Tensor& weight, double eps, int64_t kind);

Tensor layer_norm(
    const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps);

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight, double eps, bool needs_weight,
    bool needs_bias);

// The forwards of contiguous operands that the caller has checked (direct.h), on the CPU or on the GPU of that number.
// `rows` is at least 1, `dtype` is a Dtype. Pointers that an op has no use for are null.
struct Contiguous {
  const void* x;
  const void* residual; // `sum` gets x + residual
  const void* weight;
  const void* bias;
  void* y;
  void* sum;
  int64_t rows, n;
  double eps;
  int dtype, device;
};

void run_rms_norm(const Contiguous& of, int64_t form); // with a residual, add_rms_norm
void run_layer_norm(const Contiguous& of);

// From now on no wider instructions than those of the level (level.h), for tests; returns the level in use.
int64_t use_level(int64_t level);

} // namespace kernelhub

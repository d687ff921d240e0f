// The ops of a build for CUDA.

#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace kernelhub {

using torch::stable::Tensor;

// f(x @ gate.T) * (x @ up.T). x: (..., depth), gate, up: (columns, depth) -> (..., columns).
Tensor gated_product(const Tensor& x, const Tensor& gate, const Tensor& up, int64_t function);

// The same with x @ gate.T and x @ up.T, which a backward needs.
std::tuple<Tensor, Tensor, Tensor> gated_product_parts(
    const Tensor& x, const Tensor& gate, const Tensor& up, int64_t function);

// x @ q.T, x @ k.T, x @ v.T, each plus its bias, and the first two with Llama's rotary embedding. x: (..., depth), of
// batch * tokens rows, the weights: (heads * head_dim, depth), cos and sin: (batch or 1, tokens, head_dim)
// -> (..., heads * head_dim).
std::tuple<Tensor, Tensor, Tensor> rotary_projections(
    const Tensor& x, const Tensor& q, const std::optional<Tensor>& q_bias, const Tensor& k,
    const std::optional<Tensor>& k_bias, const Tensor& v, const std::optional<Tensor>& v_bias, const Tensor& cos,
    const Tensor& sin, int64_t head_dim);

// residual + x @ weight.T, rounded once. x: (..., depth), weight: (columns, depth), residual: (..., columns).
Tensor add_product(const Tensor& x, const Tensor& weight, const Tensor& residual);

// residual + (f(x @ gate.T) * (x @ up.T)) @ down.T, in one launch. x: (..., depth), gate, up: (columns, depth), down:
// (out_columns, columns), residual: (..., out_columns).
Tensor added_mlp(
    const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down, const Tensor& residual, int64_t function);

// The same with x @ gate.T and x @ up.T.
std::tuple<Tensor, Tensor, Tensor> added_mlp_parts(
    const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down, const Tensor& residual, int64_t function);

// With g = grad @ weight, the gradient of f(gate) * up: those of gate and up, and where `result` f(gate) * up, else an empty
// tensor. grad: (..., depth), weight: (depth, columns), gate, up: (..., columns) -> (..., columns) each.
std::tuple<Tensor, Tensor, Tensor> gated_gradients(
    const Tensor& grad, const Tensor& weight, const Tensor& gate, const Tensor& up, int64_t function, bool result);

} // namespace kernelhub

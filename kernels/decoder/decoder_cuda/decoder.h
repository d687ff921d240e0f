// The ops of a build for CUDA.

#pragma once

#include <cstdint>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace kernelhub {

using torch::stable::Tensor;

// f(x @ gate.T) * (x @ up.T). x: (..., depth), gate, up: (columns, depth) -> (..., columns).
Tensor gated_product(const Tensor& x, const Tensor& gate, const Tensor& up, int64_t function);

// The same with x @ gate.T and x @ up.T, which a backward needs.
std::tuple<Tensor, Tensor, Tensor> gated_product_parts(
    const Tensor& x, const Tensor& gate, const Tensor& up, int64_t function);

} // namespace kernelhub

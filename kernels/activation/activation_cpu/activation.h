#pragma once

#include <cstdint>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace kernelhub {

using torch::stable::Tensor;

// f(x)
Tensor apply(const Tensor& x, int64_t function);
Tensor apply_backward(const Tensor& grad, const Tensor& x, int64_t function);

// f(a) * b
Tensor multiply(const Tensor& a, const Tensor& b, int64_t function);
std::tuple<Tensor, Tensor> multiply_backward(
    const Tensor& grad, const Tensor& a, const Tensor& b, int64_t function);
// the gradients, and f(a) * b again, for a backward that did not keep it
std::tuple<Tensor, Tensor, Tensor> multiply_backward_result(
    const Tensor& grad, const Tensor& a, const Tensor& b, int64_t function);

// f(a) * b for the halves a and b of x's last dimension
Tensor halves(const Tensor& x, int64_t function);
Tensor halves_backward(const Tensor& grad, const Tensor& x, int64_t function);
std::tuple<Tensor, Tensor> halves_backward_result(const Tensor& grad, const Tensor& x, int64_t function);

// The forwards of contiguous operands that the caller has checked (direct.h), on the CPU or on the GPU of that number: f(a),
// or where b is not null f(a) * b. `count` is at least 1, `dtype` is a Dtype.
struct Contiguous {
  const void* a;
  const void* b;
  void* y;
  int64_t count;
  int dtype, device;
};

void run_forward(const Contiguous& of, int64_t function);

// From now on no wider instructions than those of the level (level.h), for tests; returns the level in use.
int64_t use_level(int64_t level);

} // namespace kernelhub

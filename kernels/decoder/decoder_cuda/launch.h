// What decoder.cpp asks of the kernels: plain C++, without torch and without CUDA's headers.

#pragma once

#include <cstdint>

#include "device.h"

namespace kernelhub {

// As kernels/activation numbers them.
enum Function { SILU = 0, GELU_TANH = 2 };

// y = f(a) * b with a = x @ gate.T and b = x @ up.T. x: rows x depth, gate, up: columns x depth, y: rows x columns, all
// contiguous; a and b are written where they are not null. depth and columns are multiples of 8, and all that is pointed to
// is aligned to 16 bytes: the tensors are copied by the GPU's copy engine.
struct GatedArgs {
  const void* x;
  const void* gate;
  const void* up;
  void* y;
  void* a;
  void* b;
  int64_t rows;
  int64_t columns;
  int64_t depth;
  int function;
};

// results[i] = x @ weights[i].T + biases[i], where there is one, and the first two with Llama's rotary embedding: row r takes the
// row `r % period` of cos and sin, (period, head_dim). x: rows x depth, weights: columns x depth, results: rows x columns, all
// contiguous, with the alignment of `GatedArgs`; depth is a multiple of 8, columns are multiples of head_dim, which is 64, 128
// or 256.
struct ProjectionsArgs {
  const void* x;
  const void* weights[3];
  const void* biases[3];
  void* results[3];
  const void* cos;
  const void* sin;
  int64_t rows;
  int64_t columns[3];
  int64_t depth;
  int64_t period;
  int head_dim;
};

// y = residual + x @ weight.T. x: rows x depth, weight: columns x depth, residual and y: rows x columns, as in `GatedArgs`.
struct AddArgs {
  const void* x;
  const void* weight;
  const void* residual;
  void* y;
  int64_t rows;
  int64_t columns;
  int64_t depth;
};

// With g = grad @ weight, the gradient of y = f(a) * b: a_grad = g * b * f'(a), b_grad = g * f(a), and y, where it is not null.
// grad: rows x depth, weight: depth x columns, the others rows x columns, as in `GatedArgs`.
struct GradientsArgs {
  const void* grad;
  const void* weight;
  const void* a;
  const void* b;
  void* a_grad;
  void* b_grad;
  void* y;
  int64_t rows;
  int64_t columns;
  int64_t depth;
  int function;
};

// For compute capability 9.0, BFLOAT16 and FLOAT16. Each returns a cudaError_t.
int gated_product(const GatedArgs& args, Dtype dtype, const Device& device);
int rotary_projections(const ProjectionsArgs& args, Dtype dtype, const Device& device);
int gated_gradients(const GradientsArgs& args, Dtype dtype, const Device& device);
int add_product(const AddArgs& args, Dtype dtype, const Device& device);

// Both, one's y being the other's x, with the bits that they have by themselves. `written`: 2 numbers for each 256 rows.
int added_mlp(const GatedArgs& gated, const AddArgs& added, int* written, Dtype dtype, const Device& device);

} // namespace kernelhub

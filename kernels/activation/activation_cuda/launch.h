// What activation.cpp asks of the kernels: plain C++, without torch and without CUDA's headers.

#pragma once

#include <cstdint>

#include "device.h"

namespace kernelhub {

enum Function { SILU = 0, GELU = 1, GELU_TANH = 2, GELU_QUICK = 3, FUNCTIONS = 4 };

// `rows` rows of n elements. Gradients lie in rows that are `to_stride` elements apart, y in such of n; pointers that an op has
// no use for are null, and so is y where MULTIPLY_BACKWARD is not to write f(a) * b too. What every call reads comes first,
// because a kernel waits for each 64 bytes of its arguments.
struct ElementArgs {
  RowsAt a;
  int64_t rows;
  int64_t n;
  int64_t to_stride;
  void* y;
  int function;
  RowsAt b;
  RowsAt grad;
  void* a_grad;
  void* b_grad;
  Leading a_leading, b_leading, grad_leading;
};

enum Op { APPLY, APPLY_BACKWARD, MULTIPLY, MULTIPLY_BACKWARD };

// `wide`: whether all rows are aligned to 16 bytes and made of as many. Returns a cudaError_t.
int elements(const ElementArgs& args, Op op, Dtype dtype, bool wide, const Device& device);

} // namespace kernelhub

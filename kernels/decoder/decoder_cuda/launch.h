// What decoder.cpp asks of the kernel: plain C++, without torch and without CUDA's headers.

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

// For compute capability 9.0, BFLOAT16 and FLOAT16. Returns a cudaError_t.
int gated_product(const GatedArgs& args, Dtype dtype, const Device& device);

} // namespace kernelhub

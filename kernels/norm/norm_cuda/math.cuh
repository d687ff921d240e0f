// The gates' functions, as PyTorch computes them on a GPU.

#pragma once

#include "launch.h"

namespace kernelhub {

// silu(z) or sigmoid(z).
__device__ __forceinline__ float gate_value(int gate, float z) {
  return (gate == SIGMOID ? 1.0f : z) / (1.0f + expf(-z));
}

// Their derivatives. Of e**-|z|, which does not overflow.
__device__ __forceinline__ float gate_slope(int gate, float z) {
  const float e = expf(-fabsf(z)), part = 1.0f / (1.0f + e), slope = e * part * part;
  return gate == SIGMOID ? slope : fmaf(z, slope, z < 0.0f ? e * part : part);
}

} // namespace kernelhub

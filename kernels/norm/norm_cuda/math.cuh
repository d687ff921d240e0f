// The gates' functions, as PyTorch computes them on a GPU.

#pragma once

#include "launch.h"
#include "rows.cuh"

namespace kernelhub {

// silu(z) or sigmoid(z).
template <typename T>
__device__ __forceinline__ float gate_value(int gate, float z) {
  return over<T>(gate == SIGMOID ? 1.0f : z, 1.0f + exponential<T>(-z));
}

// Either and its derivative. Of e**-|z|, which does not overflow.
struct Gated {
  float value, slope;
};
template <typename T>
__device__ __forceinline__ Gated gate_of(int gate, float z) {
  const float e = exponential<T>(-fabsf(z)), part = over<T>(1.0f, 1.0f + e);
  const float sigmoid = z < 0.0f ? e * part : part, slope = e * part * part;
  return gate == SIGMOID ? Gated{sigmoid, slope} : Gated{z * sigmoid, fmaf(z, slope, sigmoid)};
}

} // namespace kernelhub

// f and its derivative as kernels/activation has them for 16 bits: the same operations, so that the results are the same bits.

#pragma once

#include "launch.h"

namespace kernelhub {

namespace {

__device__ __forceinline__ float doubled_argument(float x) {
  return 1.5957691216057308f * fmaf(0.044715f * x * x, x, x);
}

template <int FUNCTION>
__device__ __forceinline__ float value(float x) {
  return __fdividef(x, 1.0f + __expf(-(FUNCTION == SILU ? x : doubled_argument(x))));
}

template <int FUNCTION>
__device__ __forceinline__ float slope(float x) {
  const float z = FUNCTION == SILU ? x : doubled_argument(x);
  const float e = __expf(-fabsf(z)), part = __fdividef(1.0f, 1.0f + e);
  const float by = FUNCTION == SILU ? x : x * (1.5957691216057308f * fmaf(0.134145f * x, x, 1.0f));
  return fmaf(by, e * part * part, z < 0.0f ? e * part : part);
}

} // namespace

} // namespace kernelhub

// f and its derivative, by one power and one quotient for both.

#pragma once

#include "launch.h"

namespace kernelhub {

namespace {

struct Found {
  float value, slope;
};

// f(x) = x / (1 + e**-z), z being x or what gelu's tanh is taken of, doubled. The bits of `value` are those of kernels/activation
// in 16 bits but where that is next to nothing: from a power of 2**127 on its inverse is flushed to zero, and it to -0.
template <int FUNCTION>
__device__ __forceinline__ Found find(float x) {
  const float z = FUNCTION == SILU ? x : 1.5957691216057308f * fmaf(0.044715f * x * x, x, x);
  float power, part;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(fminf(z * -1.4426950408889634f, 127.0f)));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(part) : "f"(1.0f + power));
  const float inner = FUNCTION == SILU ? 1.0f : 1.5957691216057308f * fmaf(0.134145f * x, x, 1.0f);
  return {x * part, fmaf(x * part, power * part * inner, part)}; // zero times `inner`, which is finite for longer than x * inner
}

} // namespace

} // namespace kernelhub

// f and its derivative, by one power and one quotient for both.

#pragma once

#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

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

// `start(type, function, flag)`, each a value of the type that a kernel is a template of.
template <typename Start>
cudaError_t with_types(Dtype dtype, int function, bool flag, Start start) {
  const auto with_flag = [&](auto type, auto f) {
    return flag ? start(type, f, std::true_type{}) : start(type, f, std::false_type{});
  };
  const auto with_function = [&](auto type) {
    return function == SILU ? with_flag(type, std::integral_constant<int, SILU>{})
                            : with_flag(type, std::integral_constant<int, GELU_TANH>{});
  };
  return dtype == BFLOAT16 ? with_function(__nv_bfloat16{}) : with_function(__half{});
}

} // namespace

} // namespace kernelhub

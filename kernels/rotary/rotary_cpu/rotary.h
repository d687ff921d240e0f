#pragma once

#include <cstdint>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace kernelhub {

using torch::stable::Tensor;

// q and k: ([batch,] heads, tokens, head_dim), or with `heads_dim` one further back heads and tokens the other way round;
// cos and sin: ([batch or 1,] tokens, rotary_dim or half of it). The first rotary_dim elements of each head are turned
// by pairs, as `form` (parts.h) says; the others are copied. The results lie in memory in the order that q and k do.
std::tuple<Tensor, Tensor> rotate(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, int64_t heads_dim, int64_t rotary_dim,
    int64_t form);

// inv_freq: (pairs,); positions: (batch, tokens), integers. The cosines and the sines of their products in float32, times
// `scale`, as `dtype` (device.h), (batch, tokens, pairs or twice as many) as `layout` (launch.h) says. On GPUs alone.
std::tuple<Tensor, Tensor> tables(
    const Tensor& inv_freq, const Tensor& positions, double scale, int64_t dtype, int64_t layout);

// From now on no wider instructions than those of the level (level.h), for tests; returns the level in use.
int64_t use_level(int64_t level);

} // namespace kernelhub

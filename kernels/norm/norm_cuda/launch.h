// What norm.cpp asks of the kernels: plain C++, without torch and without CUDA's headers. Each returns a cudaError_t.

#pragma once

#include <cstdint>

#include "device.h"

namespace kernelhub {

// What the gate goes through, and whether it is applied before the normalisation.
enum Gate { NO_GATE = 0, SILU = 1, SIGMOID = 2, SILU_FIRST = 3 };

// `rows` rows of n elements. Pointers that an op has no use for are null. What every call reads comes first, because a
// kernel waits for each 64 bytes of its arguments.
struct RmsArgs {
  RowsAt x;
  const void* weight;
  void* y;
  int64_t rows;
  int64_t n;
  float inverse;      // 1 / n
  float eps;
  float offset;       // added to the weight; -0.0 leaves it as it is
  int rounds;         // whether x / rms(x) is rounded before the product with the weight
  RowsAt other;       // the residual, or the gate
  void* sum;          // x + residual
  int gate;
  Leading x_leading, other_leading;
};

struct LayerArgs {
  RowsAt x;
  const void* weight; // null for ones
  const void* bias;   // null for zeros
  void* y;
  int64_t rows;
  int64_t n;
  float inverse;
  float eps;
  Leading x_leading;
};

// Gradients with regard to the input, and sums over `parts` parts of the rows of those with regard to weight and bias.
struct BackwardArgs {
  RowsAt grad;
  RowsAt x;
  RowsAt other;       // the gradient of the sum, or the gate
  const void* weight; // null for ones
  void* x_grad;
  void* gate_grad;
  float* weight_sums; // parts x n; null where they are not wanted
  float* bias_sums;
  float* statistics;  // rows x 2: mean and 1 / rms; where rows are not held in registers
  int64_t rows;
  int64_t n;
  float inverse;
  float eps;
  float offset;
  int gate;
  Leading grad_leading, x_leading, other_leading;
};

// How the gradients are computed: in one pass, in which each block adds up its rows' part of the weight's, or, where a row
// is too long for that or not aligned, in one for the input's and one for the weight's.
struct BackwardPlan {
  int64_t parts;
  unsigned across, together;
  int each;   // 16-byte parts of a row to a thread; 0 for two passes
  int stages; // rows that a thread has in flight or at hand
};

enum Kind { PLAIN, ADD, GATED, LAYER };

// `wide`: whether all rows are aligned to 16 bytes and made of as many.
int rms(const RmsArgs& args, Kind kind, Dtype dtype, bool wide, const Device& device);
int rms_gated(const RmsArgs& args, Dtype dtype, bool wide, const Device& device);
int layer(const LayerArgs& args, Dtype dtype, bool wide, const Device& device);
BackwardPlan plan_backward(int64_t rows, int64_t n, Kind kind, Dtype dtype, bool wide, const Device& device);
int rms_backward(const BackwardArgs& args, Kind kind, Dtype dtype, bool wide, const BackwardPlan& plan, const Device& device);
int rms_gated_backward(const BackwardArgs& args, Dtype dtype, bool wide, const BackwardPlan& plan, const Device& device);
int layer_backward(const BackwardArgs& args, Dtype dtype, bool wide, const BackwardPlan& plan, const Device& device);

// The sums of `parts` rows of n floats each, as T, and of as many more where there is a second result.
int add_parts(const float* first, void* first_sum, const float* second, void* second_sum, int64_t parts, int64_t n,
              Dtype dtype, const Device& device);

} // namespace kernelhub

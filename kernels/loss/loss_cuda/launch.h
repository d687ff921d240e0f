// What loss.cpp asks of the kernels: plain C++, without torch and without CUDA's headers. Each returns a cudaError_t.

#pragma once

#include <cstdint>

#include "device.h"

namespace kernelhub {

// Rows of a launch: as many as it has blocks. Where there are more, the logits' rows lie at one stride.
constexpr int64_t AT_ONCE = 0x7fffffff;

// `rows` rows of n logits. Pointers that an op has no use for are null.
struct LossArgs {
  RowsAt logits;
  const int64_t* labels;
  int64_t rows;
  int64_t n;
  int64_t ignore_index;
  float* losses;
  float* kept;        // rows x 2: the largest logit, and 1 / sum(exp(x - most))
  const float* scale; // rows: what each row's gradient is multiplied with
  void* grad;         // rows x n
  double smoothing;
  double z;
  Leading logits_leading;
};

// n elements from x on, and the number to multiply them with.
struct ScaleArgs {
  void* x;
  int64_t n;
  const float* by;
};

// Losses and what the gradient needs to know of each row; and the gradient, which may be where the logits are, if asked for.
int losses(const LossArgs& args, Dtype dtype, bool wide, const Device& device);
// The gradient, of what `losses` kept.
int gradients(const LossArgs& args, Dtype dtype, bool wide, const Device& device);
// x times a number, in place.
int scale(const ScaleArgs& args, Dtype dtype, bool wide, const Device& device);

} // namespace kernelhub

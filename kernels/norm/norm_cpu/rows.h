// What the ops of kernelhub/norm do to one row, as a table of functions: one per dtype, form and level of instructions.

#pragma once

#include <cstdint>

#include "level.h"
#include "types.h"

namespace kernelhub {

// Where the result is rounded to the input's dtype: before the product with the weight and after it, or only after it;
// and then with the weight as it is, or with 1 + weight.
enum Form { CAST_FIRST = 0, CAST_LAST = 1, ZERO_CENTERED = 2, FORMS = 3 };

// What the gate goes through, and whether it is applied before the normalisation.
enum Gate { NO_GATE = 0, SILU = 1, SIGMOID = 2, SILU_FIRST = 3 };

// One row of n elements. Pointers that an op has no use for are null; `x` and the like are of the row's dtype.
struct RmsRow {
  const void* x;
  const void* residual; // added to x first; `sum` gets the result
  const void* gate;
  const void* weight;
  void* y;
  void* sum;
  int64_t n;
  float eps;
};

struct RmsBackwardRow {
  const void* grad;
  const void* sum_grad; // of the second result, x + residual; null where there is none
  const void* x;
  const void* weight;
  void* x_grad;
  float* weight_grad; // added to; null where it is not wanted
  int64_t n;
  float eps;
};

struct GatedBackwardRow {
  const void* grad;
  const void* x;
  const void* gate;
  const void* weight;
  void* x_grad;
  void* gate_grad;
  float* weight_grad; // added to; null where it is not wanted
  float* scratch;     // n floats
  int64_t n;
  float eps;
};

struct LayerRow {
  const void* x;
  const void* weight; // null for ones
  const void* bias;   // null for zeros
  void* y;
  int64_t n;
  float eps;
};

struct LayerBackwardRow {
  const void* grad;
  const void* x;
  const void* weight;
  void* x_grad;
  float* weight_grad; // added to; null where it is not wanted
  float* bias_grad;   // added to; null where it is not wanted
  int64_t n;
  float eps;
};

struct Rows {
  void (*rms[DTYPES][FORMS])(const RmsRow&);
  void (*add_rms[DTYPES][FORMS])(const RmsRow&);
  void (*rms_backward[DTYPES][FORMS])(const RmsBackwardRow&);
  void (*gated[DTYPES][2][4])(const RmsRow&); // [dtype][form: CAST_FIRST or CAST_LAST][gate]
  void (*gated_backward[DTYPES][4])(const GatedBackwardRow&);
  void (*layer[DTYPES])(const LayerRow&);
  void (*layer_backward[DTYPES])(const LayerBackwardRow&);
  void (*add)(float* to, const float* from, int64_t n);
  void (*narrow[DTYPES])(void* to, const float* from, int64_t n);
};

// One source file each.
namespace plain {
extern const Rows rows;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Rows rows;
}
namespace avx512 {
extern const Rows rows;
}
#endif

// The functions for a level that this processor has.
inline const Rows& rows_of(Level level) {
#if defined(__x86_64__)
  if (level == AVX512) {
    return avx512::rows;
  }
  if (level == AVX2) {
    return avx2::rows;
  }
#endif
  return plain::rows;
}

} // namespace kernelhub

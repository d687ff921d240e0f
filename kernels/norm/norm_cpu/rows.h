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
  void* sum;
  const void* before; // with a residual: the sums of the row before, which is finished now; null where there is none
  void* y;            // of `before`, where there is one
  float* scratch;     // n floats, where the gate comes first
  int64_t n;
  float eps;
  float scale;  // of `before`
  float offset; // of the weight: 1, or -0 for none
  bool is_silu; // what the gate goes through, else the sigmoid
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
  float offset; // as above
};

// In float32 only: rows of another dtype are widened before and narrowed after.
struct GatedBackwardRow {
  const float* grad;
  const float* x;
  const float* gate;
  const float* weight;
  float* x_grad;
  float* gate_grad;
  float* weight_grad; // added to
  float* scratch;     // n floats
  int64_t n;
  float eps;
  Gate gate_kind;
};

struct Moments {
  float mean, scale;
};

struct LayerRow {
  const void* x;
  const void* weight; // null for ones
  const void* bias;   // null for zeros
  const void* before; // the row before, which is finished now; null where there is none
  void* y;            // of `before`
  int64_t n;
  float eps;
  Moments found; // of `before`
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
  // [dtype][whether the form is CAST_FIRST]
  void (*rms[DTYPES][2])(const RmsRow&);
  float (*add_rms[DTYPES][2])(const RmsRow&); // gives the scale with which the row is to be finished
  void (*last_rms[DTYPES][2])(const RmsRow&); // only finishes
  void (*rms_backward[DTYPES])(const RmsBackwardRow&);
  void (*gated[DTYPES][2])(const RmsRow&);
  void (*gated_first[DTYPES])(const RmsRow&); // CAST_FIRST
  void (*gated_backward)(const GatedBackwardRow&);
  Moments (*layer[DTYPES])(const LayerRow&); // with these a row is to be finished
  void (*last_layer[DTYPES])(const LayerRow&);
  void (*layer_backward[DTYPES])(const LayerBackwardRow&);
  void (*add)(float* to, const float* from, int64_t n);
  void (*widen[DTYPES])(float* to, const void* from, int64_t n);
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

// What the op of kernelhub/decoder consists of, as a table of functions: one per dtype and level of instructions. What lies
// between its steps lies in float32, rounded to the dtype wherever the modules apart would round.

#pragma once

#include <cstdint>
#include <type_traits>

#include "level.h"
#include "types.h"

namespace kernelhub {

// The activation of the gate, by the numbers that kernelhub/activation gives them.
enum Function { SILU = 0, GELU_TANH = 2, FUNCTIONS = 3 };

// Where a norm's result is rounded, as kernelhub/norm numbers it; without a norm, rows are only widened.
enum Form { NO_NORM = -1, CAST_FIRST = 0, CAST_LAST = 1, ZERO_CENTERED = 2, FORMS = 3 };

// One row of n elements -> its norm in float32, with zeros up to `padded` elements.
struct InputRow {
  const void* x;
  const void* residual; // added to x first; null where there is none
  const void* weight;   // of the norm
  float* sum;           // gets x + residual, where there is a residual
  float* y;
  int64_t n, padded;
  float eps;
  Form form;
};

// y[r, o] = sum over k of x[r, k] * weight[o, k], for the outputs from `begin` to `end`.
struct Product {
  const void* weight; // (outputs, n), contiguous
  const float* x;     // rows of n elements with zeros behind them, `x_stride` apart
  float* y;           // rows `y_stride` apart
  int64_t rows, n, x_stride, y_stride, begin, end;
};

// n elements of gate and up, biases (or null) not yet added: gate = f(gate) * up.
struct Gated {
  float* gate;
  const float* up;
  const void* gate_bias;
  const void* up_bias;
  int64_t n;
};

// n elements of the result: y = x + bias + residual, the latter two null where there are none.
struct OutputRow {
  const float* x;
  const void* bias;
  const float* residual;
  void* y;
  int64_t n;
};

constexpr int64_t ROWS = 64; // that a product takes at most

struct Table {
  void (*input[DTYPES])(const InputRow&);
  void (*product[DTYPES])(const Product&);
  void (*gated[DTYPES][FUNCTIONS])(const Gated&);
  void (*output[DTYPES])(const OutputRow&);
};

// One source file each.
namespace plain {
extern const Table table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Table table;
}
namespace avx512 {
extern const Table table;
}
#endif

// The functions for a level that this processor has.
inline const Table& table_of(Level level) {
#if defined(__x86_64__)
  if (level == AVX512) {
    return avx512::table;
  }
  if (level == AVX2) {
    return avx2::table;
  }
#endif
  return plain::table;
}

} // namespace kernelhub

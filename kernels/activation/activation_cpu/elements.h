// What the ops of kernelhub/activation do to elements that lie side by side, as a table: one entry per dtype and function.

#pragma once

#include <cstdint>

#include "level.h"
#include "types.h"

namespace kernelhub {

enum Function { SILU = 0, GELU = 1, GELU_TANH = 2, GELU_QUICK = 3, FUNCTIONS = 4 };

// n elements; pointers that an op has no use for are null.
struct Elements {
  const void* grad;
  const void* a;
  const void* b;
  void* y;
  void* a_grad;
  void* b_grad;
  int64_t n;
};

struct Table {
  void (*apply[DTYPES][FUNCTIONS])(const Elements&);             // y = f(a)
  void (*apply_backward[DTYPES][FUNCTIONS])(const Elements&);    // a_grad = grad * f'(a)
  void (*multiply[DTYPES][FUNCTIONS])(const Elements&);          // y = f(a) * b
  void (*multiply_backward[DTYPES][FUNCTIONS])(const Elements&); // a_grad = grad * b * f'(a), b_grad = grad * f(a);
                                                                 // y = f(a) * b where it is not null
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

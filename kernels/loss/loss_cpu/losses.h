// What the ops of kernelhub/loss do to one row of logits, as a table of functions: one per dtype and level of instructions.

#pragma once

#include <cstdint>

#include "level.h"
#include "types.h"

namespace kernelhub {

// Of a row x: its largest element, the sum of exp(x - most), and the sum of x - most where that is asked for.
struct Sums {
  float most;
  double total;
  double plain;
};

// grad = scale * inverse * exp(x - most) - less; of the label's element, scale * (inverse * exp(x - most) - more) - less.
struct GradientRow {
  const void* x;
  void* grad; // may be x
  int64_t n;
  int64_t label;
  float most;
  float inverse; // 1 / total, times what a z-loss adds
  float scale;
  float less; // what label smoothing takes from every class, scaled
  float more; // what the class of the label has less: 1 - smoothing
};

struct Losses {
  Sums (*sums[DTYPES][2])(const void* x, int64_t n); // without and with the plain sum
  void (*gradient[DTYPES])(const GradientRow&);
};

// One source file each.
namespace plain {
extern const Losses losses;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Losses losses;
}
namespace avx512 {
extern const Losses losses;
}
#endif

// The functions for a level that this processor has.
inline const Losses& losses_of(Level level) {
#if defined(__x86_64__)
  if (level == AVX512) {
    return avx512::losses;
  }
  if (level == AVX2) {
    return avx2::losses;
  }
#endif
  return plain::losses;
}

} // namespace kernelhub

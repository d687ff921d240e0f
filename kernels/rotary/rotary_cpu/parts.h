// What the op of kernelhub/rotary does to some heads of some tokens, as a table of functions: one per dtype, way of
// rounding, pairs, and level of instructions.

#pragma once

#include <cstdint>

#include "level.h"
#include "types.h"

namespace kernelhub {

// The form, as bits.
enum Form {
  INTERLEAVED = 1, // pairs are elements 2i and 2i + 1, not i and i + rotary_dim / 2
  INVERSE = 2,     // by the negative angle
  TRANSPOSED = 4,  // the transposed matrix: what turns a gradient of the result into one of the input
  ROUND_ONCE = 8,  // computed in float32, rounded at the end; else products are rounded too
  FORMS = 16,
};

// What the products are rounded to, and what cos and sin are: by the elements' own dtype, or float32.
enum Table { ROUNDED = 0, WIDE = 1, WIDE_TABLE = 2, TABLES = 3 };

// Strides are in elements.
struct Part {
  const void* x;
  void* y;
  const void* cos;
  const void* sin;
  int64_t heads, tokens;
  int64_t x_head, x_token, y_head, y_token, cos_token, sin_token;
  int64_t width;  // of a head
  int64_t rotary; // of the elements that are turned
  bool paired;    // cos and sin have one element for each pair
  bool inverse;
  bool transposed;
};

struct Parts {
  void (*rotate[DTYPES][TABLES][2])(const Part&); // [dtype][table][interleaved]
};

// One source file each.
namespace plain {
extern const Parts parts;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Parts parts;
}
namespace avx512 {
extern const Parts parts;
}
#endif

// The functions for a level that this processor has.
inline const Parts& parts_of(Level level) {
#if defined(__x86_64__)
  if (level == AVX512) {
    return avx512::parts;
  }
  if (level == AVX2) {
    return avx2::parts;
  }
#endif
  return plain::parts;
}

} // namespace kernelhub

// What elements are.

#pragma once

#include <cstdint>

namespace kernelhub {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, DTYPES = 3 };

} // namespace kernelhub

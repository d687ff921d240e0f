// What the host's side and the GPU's side of an op tell each other: plain C++, without torch and without CUDA's headers.

#pragma once

#include <cstdint>

namespace kernelhub {

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// The rows of a tensor: where the first lies, and how far apart they are in bytes. Leading dimensions that one stride steps
// through are one. `stride` is the outermost one's; where there are others, `Leading` has them, from the outside inwards.
struct RowsAt {
  const char* data;
  int64_t stride;
  int64_t others;
};
struct Leading {
  static constexpr int MOST = 2;
  int64_t strides[MOST];
  int64_t sizes[MOST];
};

// The GPU and the stream that an op runs on.
struct Device {
  int index;
  int multiprocessors;
  int threads; // that one has at a time
  int shared; // bytes of shared memory that a block may have
  int cache; // bytes of the second cache
  int capability; // its compute capability, 90 for 9.0
  void* stream;  // cudaStream_t
};

} // namespace kernelhub

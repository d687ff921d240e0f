#include "parts.h"

namespace kernelhub::plain {

#define KERNELHUB_LEVEL 0
#include "simd.h"

#include "part_kernels.h"

} // namespace kernelhub::plain

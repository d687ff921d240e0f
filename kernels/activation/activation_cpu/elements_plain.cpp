#include "elements.h"

namespace kernelhub::plain {

#define KERNELHUB_LEVEL 0
#include "simd.h"

#include "element_kernels.h"

} // namespace kernelhub::plain

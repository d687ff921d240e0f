#include "rows.h"

namespace kernelhub::plain {

#define KERNELHUB_LEVEL 0
#include "simd.h"

#include "row_kernels.h"

} // namespace kernelhub::plain

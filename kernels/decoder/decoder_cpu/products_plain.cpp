#include "products.h"

namespace kernelhub::plain {

#define KERNELHUB_LEVEL 0
#include "simd.h"

#include "product_kernels.h"

} // namespace kernelhub::plain

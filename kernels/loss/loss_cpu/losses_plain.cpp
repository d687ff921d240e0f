#include "losses.h"

namespace kernelhub::plain {

#define KERNELHUB_LEVEL 0
#include "simd.h"

#include "loss_kernels.h"

} // namespace kernelhub::plain

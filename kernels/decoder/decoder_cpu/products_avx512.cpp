#include "products.h"

#if defined(__x86_64__)

#include <immintrin.h>

// Allowed from here on only: what the headers above define inline may end up in code that every processor runs.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

namespace kernelhub::avx512 {

#define KERNELHUB_LEVEL 2
#include "simd.h"

#include "product_kernels.h"

} // namespace kernelhub::avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif

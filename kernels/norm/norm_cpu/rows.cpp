#include "rows.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// One source for all levels: included again for each, with its instructions allowed from here to the end of its namespace.
// Lambdas say it themselves: g++ does not pass what the pragma allows on to them.

#if defined(__x86_64__) && defined(__clang__)
#define KH_ALLOW_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c\"))), apply_to = function)")
#define KH_ALLOW_AVX512 \
  _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c\"))), apply_to = function)")
#define KH_ALLOW_END _Pragma("clang attribute pop")
#elif defined(__x86_64__)
#define KH_ALLOW_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")
#define KH_ALLOW_AVX512 \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c\")")
#define KH_ALLOW_END _Pragma("GCC pop_options")
#endif

#define KH_LAMBDA __attribute__((always_inline))

namespace kernelhub {

#if defined(__x86_64__)

KH_ALLOW_AVX512
namespace avx512 {
#define KERNELHUB_LEVEL 2
#include "simd.h"
#include "row_kernels.h"
#undef KERNELHUB_LEVEL
#undef KH_INLINE
} // namespace avx512
KH_ALLOW_END

KH_ALLOW_AVX2
namespace avx2 {
#define KERNELHUB_LEVEL 1
#include "simd.h"
#include "row_kernels.h"
#undef KERNELHUB_LEVEL
#undef KH_INLINE
} // namespace avx2
KH_ALLOW_END

#endif

namespace plain {
#define KERNELHUB_LEVEL 0
#include "simd.h"
#include "row_kernels.h"
} // namespace plain

const Rows& rows_of(Level level) {
#if defined(__x86_64__)
  if (level == AVX512) {
    return avx512::rows;
  }
  if (level == AVX2) {
    return avx2::rows;
  }
#endif
  return plain::rows;
}

} // namespace kernelhub

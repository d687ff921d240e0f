// Rows on the GPU: 16 bytes at a time, and launches.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "device.h"

namespace kernelhub {

using BFloat16 = __nv_bfloat16;
using Half = __half;

// V elements of T as they lie in memory: 16 bytes, or one element where rows are not aligned.
template <typename T, int V>
struct Pack {
  static_assert(V * sizeof(T) == 16);
  uint32_t words[4];
};
template <typename T>
struct Pack<T, 1> {
  T value;
};

// Threads that a multiprocessor has at a time, as `Device` says on the host's side: more blocks may not be asked for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int RESIDENT = 1024;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 800 && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ == 1010 || __CUDA_ARCH__ >= 1100)
constexpr int RESIDENT = 1536;
#else
constexpr int RESIDENT = 2048;
#endif

template <typename T>
constexpr int WIDE = 16 / static_cast<int>(sizeof(T)); // elements in 16 bytes

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(Half x) { return __half2float(x); }
template <typename T>
__device__ __forceinline__ T narrow(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return widen(narrow<T>(x));
}

// e**x and a / b: in 16 bits by what the GPU has instructions for, a tenth as long, whose error of 2**-21 or so decides how
// one of 4,000 values is rounded. Powers below the least normal number are 0 then.
template <typename T>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (sizeof(T) == 4) {
    return expf(x);
  } else {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
    return y;
  }
}
template <typename T>
__device__ __forceinline__ float over(float a, float b) {
  return sizeof(T) == 4 ? a / b : __fdividef(a, b);
}

template <typename T, int V>
__device__ __forceinline__ void unpack(const Pack<T, V>& from, float (&to)[V]) {
  if constexpr (V == 1) {
    to[0] = widen(from.value);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      to[v] = __uint_as_float(from.words[v]);
    }
  } else {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      if constexpr (std::is_same_v<T, BFloat16>) { // the upper half of a float's bits
        to[2 * word] = __uint_as_float(from.words[word] << 16);
        to[2 * word + 1] = __uint_as_float(from.words[word] & 0xffff0000u);
      } else {
        const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&from.words[word]));
        to[2 * word] = two.x;
        to[2 * word + 1] = two.y;
      }
    }
  }
}

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> pack(const float (&from)[V]) {
  Pack<T, V> to;
  if constexpr (V == 1) {
    to.value = narrow<T>(from[0]);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      to.words[v] = __float_as_uint(from[v]);
    }
  } else {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      if constexpr (std::is_same_v<T, BFloat16>) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(from[2 * word], from[2 * word + 1]);
        to.words[word] = *reinterpret_cast<const uint32_t*>(&two);
      } else {
        const __half2 two = __floats2half2_rn(from[2 * word], from[2 * word + 1]);
        to.words[word] = *reinterpret_cast<const uint32_t*>(&two);
      }
    }
  }
  return to;
}

// A pack of one number.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> filled(float with) {
  float of[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    of[v] = with;
  }
  return pack<T, V>(of);
}
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> zeros() {
  return filled<T, V>(0.0f);
}

// Pack i of what begins at `from`. Plain loads and stores: on H200 loads past L1 (no_allocate) are 6 % slower in every kernel.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load(const void* from, int64_t i) {
  const Pack<T, V>* at = static_cast<const Pack<T, V>*>(from) + i;
  Pack<T, V> to;
  if constexpr (V == 1) {
    to.value = at->value;
  } else {
    const uint4 four = *reinterpret_cast<const uint4*>(at);
    to.words[0] = four.x, to.words[1] = four.y, to.words[2] = four.z, to.words[3] = four.w;
  }
  return to;
}

// Pack i of what is read again, which the caches are told to keep; or for the LAST time, so that it may go.
template <typename T, int V, bool LAST>
__device__ __forceinline__ Pack<T, V> load_hinted(const void* from, int64_t i) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const uint4* at = static_cast<const uint4*>(from) + i;
  Pack<T, V> to;
  if constexpr (!LAST) {
    asm volatile(
        "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_last.b64 policy, 1.0;\n"
        "ld.global.L1::evict_last.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], policy;\n}"
        : "=r"(to.words[0]), "=r"(to.words[1]), "=r"(to.words[2]), "=r"(to.words[3]) : "l"(at) : "memory");
  } else {
    asm volatile(
        "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "ld.global.L1::evict_first.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], policy;\n}"
        : "=r"(to.words[0]), "=r"(to.words[1]), "=r"(to.words[2]), "=r"(to.words[3]) : "l"(at) : "memory");
  }
  return to;
#else
  return load<T, V>(from, i);
#endif
}

template <typename T, int V>
__device__ __forceinline__ void store(void* to, int64_t i, const Pack<T, V>& from) {
  Pack<T, V>* at = static_cast<Pack<T, V>*>(to) + i;
  if constexpr (V == 1) {
    at->value = from.value;
  } else {
    *reinterpret_cast<uint4*>(at) = make_uint4(from.words[0], from.words[1], from.words[2], from.words[3]);
  }
}
template <typename T, int V>
__device__ __forceinline__ void store(void* to, int64_t i, const float (&from)[V]) {
  store(to, i, pack<T, V>(from));
}

// Each x rounded to T, times the weight, rounded again; in 16 bits two at a time, whose products are exact before they are.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> rounded_product(const float (&x)[V], const Pack<T, V>& weight) {
  if constexpr (V == 1 || sizeof(T) == 4) {
    float w[V], y[V];
    unpack(weight, w);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      y[v] = rounded<T>(x[v]) * w[v];
    }
    return pack<T, V>(y);
  } else {
    using Two = std::conditional_t<std::is_same_v<T, BFloat16>, __nv_bfloat162, __half2>;
    Pack<T, V> y = pack<T, V>(x);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const Two two = __hmul2_rn(
          *reinterpret_cast<const Two*>(&y.words[word]), *reinterpret_cast<const Two*>(&weight.words[word]));
      y.words[word] = *reinterpret_cast<const uint32_t*>(&two);
    }
    return y;
  }
}

// Copies 16 bytes into shared memory while the thread goes on; `commit` ends a group of such copies, and `wait_for_copies`
// waits until at most PENDING groups are not done. AGAIN: of what other blocks will read, too, through L1.
template <bool AGAIN = false>
__device__ __forceinline__ void copy_behind(uint4* to, const void* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (AGAIN) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  }
#else
  *to = *static_cast<const uint4*>(from);
#endif
}
__device__ __forceinline__ void commit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// Keeps the compiler from holding elements in float32 over a sum, which takes twice the registers that they came in.
template <typename T, int V>
__device__ __forceinline__ void forget(Pack<T, V>& x) {
  if constexpr (V != 1 && sizeof(T) == 2) {
    asm volatile("" : "+r"(x.words[0]), "+r"(x.words[1]), "+r"(x.words[2]), "+r"(x.words[3]));
  }
}

// Of a row that there is; of one past the end nothing may be read.
__device__ __forceinline__ const char* row_at(const RowsAt& rows, const Leading& leading, int64_t row) {
  const char* at = rows.data;
#pragma unroll
  for (int dim = Leading::MOST - 1; dim >= 0; --dim) {
    if (dim < rows.others) {
      const int64_t size = leading.sizes[dim];
      int64_t of, left;
      if (((row | size) >> 32) == 0) {
        of = static_cast<uint32_t>(row) / static_cast<uint32_t>(size);
        left = static_cast<uint32_t>(row) % static_cast<uint32_t>(size);
      } else {
        of = row / size, left = row % size;
      }
      at += left * leading.strides[dim];
      row = of;
    }
  }
  return at + row * rows.stride;
}

// Launched early (see `launch`), a kernel reads and writes nothing before all that came before it is done. None says early
// that the next may start (launch_dependents): where that is done 64 rows take 1.84 us and not 1.70.
__device__ __forceinline__ void wait_for_input() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

constexpr int MOST_ROWS = 4; // in a block, of rows of more than a warp

// How a grid covers rows: `across` threads for each, `together` rows in a block.
struct Cover {
  unsigned blocks, across, together;
};

inline int round_up(int value, int to) { return (value + to - 1) / to * to; }

// Threads for `parts` parts of a row, where each takes up to `each`: a power of 2 below a warp, else whole warps.
inline int threads_for(int parts, int each) {
  const int wanted = (parts + each - 1) / each;
  if (wanted >= 32) {
    return round_up(wanted, 32);
  }
  int across = 1;
  while (across < wanted) {
    across *= 2;
  }
  return across;
}

inline Cover cover(int64_t rows, int across, int least) {
  const int wanted = across >= least ? 1 : least / across, together = across > 32 ? std::min(wanted, MOST_ROWS) : wanted;
  const int64_t blocks = (rows + together - 1) / together;
  constexpr int64_t most = 0x7fffffff;
  return {static_cast<unsigned>(blocks < most ? blocks : most), static_cast<unsigned>(across),
          static_cast<unsigned>(together)};
}

// How many packs a thread takes where there are many rows: of rows of 256 to 1024 packs, and of others; and the threads of a
// block, about.
struct Habit {
  int middle, other, threads;
};

// Whether what counts is when the first is done, not that memory is kept busy.
inline bool few(int64_t rows, const Device& device) { return rows <= 4 * device.multiprocessors; }

// `start(each, grid, block)` for rows of n elements: how many packs of V each thread takes (1, 2, 4 or `most`), or 0 where
// it walks along the row, because that is longer than so many or not aligned.
template <typename Start>
cudaError_t cover_rows(
    int64_t rows, int64_t n, int V, bool wide, int most, const Habit& habit, const Device& device, const Start& start) {
  const int64_t parts = wide ? n / V : n;
  int each = 0;
  if (wide && parts <= 512 * most && rows < 0x7fffffff) {
    if (few(rows, device)) {
      each = parts <= 32 ? 1 : parts <= 2048 ? 2 : most;
    } else {
      each = parts % 64 == 0 && parts >= 256 && parts <= 1024 ? habit.middle : habit.other;
    }
    each = parts > (each <= 2 ? 1024 : 512) * each ? most : each;
  }
  const int across = each > 0       ? threads_for(static_cast<int>(parts), each)
                     : parts < 4096 ? threads_for(static_cast<int>(parts), 4)
                                    : 1024;
  const Cover to = cover(rows, across, few(rows, device) ? 32 : across > 128 && each < 8 ? habit.threads : 256);
  return start(each, dim3(to.blocks), dim3(to.across, to.together));
}

template <typename Run>
cudaError_t for_dtype(Dtype dtype, const Run& run) {
  switch (dtype) {
    case FLOAT32:
      return run(float{});
    case BFLOAT16:
      return run(BFloat16{});
    default:
      return run(Half{});
  }
}

// Where the device can, the launch overlaps with the end of what ran before (programmatic dependent launch): in a chain of
// small kernels that is half of their time.
template <typename Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, dim3 block, size_t shared, const Device& device, const Args& args) {
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(device.stream);
  config.attrs = &overlap;
  config.numAttrs = device.capability >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

} // namespace kernelhub

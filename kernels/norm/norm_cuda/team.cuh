// Sums over a row by the threads that share it.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace kernelhub {

// The threads that share a row: blockDim.x of them, LEAST to MOST, a power of 2 or a multiple of 32; threadIdx.y counts rows,
// of which a block has at most ROWS where one takes more than a warp.
template <int ROWS, int LEAST = 1, int MOST = 1024>
struct Team {
  int lane, across;

  __device__ Team() : lane(threadIdx.x), across(blockDim.x) {}

  // The sums over the row of each of K numbers, the same for all its threads, in an order that only the shape decides. To be
  // called by all threads of the row's warps; `shared` is for `SHARED<K>` floats, 16 bytes aligned, and not the same twice
  // running.
  template <int K>
  __device__ __forceinline__ void sum(float (&of)[K], float* shared) const {
    static_assert(K == 1 || K == 2 || K == 4);
    if (LEAST <= 32 && across <= 32) {
#pragma unroll
      for (int offset = 16; offset > 0; offset >>= 1) {
        if (LEAST == 32 || offset < across) {
          add_across(of, offset);
        }
      }
    } else if (MOST <= 4 * 32 || across <= 4 * 32) {
      by_warps<4>(of, shared);
    } else if (MOST <= 8 * 32 || across <= 8 * 32) {
      by_warps<8>(of, shared);
    } else if (MOST <= 16 * 32 || across <= 16 * 32) {
      by_warps<16>(of, shared);
    } else {
      by_warps<32>(of, shared);
    }
  }

 private:
  template <int K>
  __device__ __forceinline__ static void add_across(float (&of)[K], int offset) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      of[k] += __shfl_xor_sync(0xffffffffu, of[k], offset);
    }
  }

  // Of a row of up to PLACES warps, which have as many places in shared memory for each sum; what no warp has is zero.
  template <int PLACES, int K>
  __device__ __forceinline__ void by_warps(float (&of)[K], float* shared) const {
    const unsigned within = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    // Each of K groups of a warp's threads adds up a sum of its own: of two by 5 shuffles, not 10, of four by 6, not 20.
    constexpr unsigned GROUP = 32 / K;
    const unsigned mine = within / GROUP, place = warp + within % GROUP * warps;
    float left[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      left[k] = of[k];
    }
#pragma unroll
    for (int sums = K / 2, offset = 16; sums > 0; sums /= 2, offset /= 2) {
      const bool upper = (within & offset) != 0;
#pragma unroll
      for (int k = 0; k < sums; ++k) {
        const float kept = upper ? left[k + sums] : left[k], given = upper ? left[k] : left[k + sums];
        left[k] = kept + __shfl_xor_sync(0xffffffffu, given, offset);
      }
    }
    float total = left[0];
#pragma unroll
    for (int offset = GROUP / 2; offset > 0; offset >>= 1) {
      total += __shfl_xor_sync(0xffffffffu, total, offset);
    }
    float* const row = shared + threadIdx.y * (K * PLACES);
    if (place < PLACES) {
      row[mine * PLACES + place] = within % GROUP == 0 ? total : 0.0f;
    }
    wait();
    if constexpr (PLACES <= 16) { // at once by every thread: sooner there than by shuffles
#pragma unroll
      for (int k = 0; k < K; ++k) {
        float4 four = *reinterpret_cast<const float4*>(row + k * PLACES);
#pragma unroll
        for (int i = 4; i < PLACES; i += 4) {
          const float4 more = *reinterpret_cast<const float4*>(row + k * PLACES + i);
          four.x += more.x, four.y += more.y, four.z += more.z, four.w += more.w;
        }
        of[k] = (four.x + four.y) + (four.z + four.w);
      }
    } else {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        of[k] = row[k * PLACES + within];
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset >>= 1) {
        add_across(of, offset);
      }
    }
  }

  // For the row's own threads. A barrier of which the compiler does not know the number counts for all 16 of a block, and a
  // multiprocessor has 64: 4 blocks, however small. With 5 for up to 4 rows RMSNorm of 4096 x 2048 takes 5.9 us on an H200,
  // not 6.7.
  __device__ __forceinline__ void wait() const {
    if constexpr (ROWS <= 4) {
      switch (threadIdx.y) {
        case 0:
          return wait_at<1>();
        case 1:
          return wait_at<2>();
        case 2:
          return wait_at<3>();
        default:
          return wait_at<4>();
      }
    } else { // the first barrier is the block's
      static_assert(ROWS <= 15);
      asm volatile("bar.sync %0, %1;" ::"r"(threadIdx.y + 1), "r"(across) : "memory");
    }
  }
  template <int BARRIER>
  __device__ __forceinline__ void wait_at() const {
    asm volatile("bar.sync %0, %1;" ::"n"(BARRIER), "r"(across) : "memory");
  }
};

// Rows of two warps or more, at most 15 of them in a block of 32 warps, have at most 60 places.
template <int K>
constexpr int SHARED = K * 64;

} // namespace kernelhub

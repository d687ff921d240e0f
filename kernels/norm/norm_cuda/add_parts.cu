#include "launch.h"
#include "rows.cuh"

namespace kernelhub {

namespace {

struct PartsArgs {
  const float* from[2];
  void* to[2];
  int64_t parts, n;
};

// A block adds up 32 columns: warp y every 32nd part from y on, then the warps' sums in turn.
template <typename T>
__global__ void __launch_bounds__(1024) sum_parts(const __grid_constant__ PartsArgs args) {
  __shared__ float shared[32][33];
  wait_for_input();
  const float* from = args.from[blockIdx.y];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float total = 0.0f;
  if (column < args.n) {
#pragma unroll 8
    for (int64_t part = threadIdx.y; part < args.parts; part += 32) {
      total += from[part * args.n + column];
    }
  }
  shared[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  total = shared[threadIdx.x][threadIdx.y]; // warp y: column y
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    total += __shfl_xor_sync(0xffffffffu, total, offset);
  }
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.y;
  if (threadIdx.x == 0 && mine < args.n) {
    static_cast<T*>(args.to[blockIdx.y])[mine] = narrow<T>(total);
  }
}

} // namespace

int add_parts(const float* first, void* first_sum, const float* second, void* second_sum, int64_t parts, int64_t n,
              Dtype dtype, const Device& device) {
  const bool one = first == nullptr || second == nullptr;
  const PartsArgs args{{first != nullptr ? first : second, second}, {first != nullptr ? first_sum : second_sum, second_sum},
                       parts, n};
  const dim3 grid(static_cast<unsigned>((n + 31) / 32), one ? 1 : 2);
  return for_dtype(dtype, [&](auto of) { return launch(sum_parts<decltype(of)>, grid, dim3(32, 32), 0, device, args); });
}

} // namespace kernelhub

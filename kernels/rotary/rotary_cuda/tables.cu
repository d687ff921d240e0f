#include "launch.h"
#include "rows.cuh"

namespace kernelhub {

namespace {

// V elements, written at once.
template <typename T, int V>
struct alignas(V * sizeof(T)) Group {
  T elements[V];
};

__device__ __forceinline__ float read(const char* at, Dtype dtype) {
  return dtype == FLOAT32 ? *reinterpret_cast<const float*>(at)
      : dtype == BFLOAT16 ? widen(*reinterpret_cast<const BFloat16*>(at))
                          : widen(*reinterpret_cast<const Half*>(at));
}

// V angles, as `layout` has them, from the first of the row on; `at` is the first of them.
template <typename T, int V>
__device__ __forceinline__ void write(char* row, int64_t at, const TablesArgs& args, const float (&values)[V]) {
  T* const to = reinterpret_cast<T*>(row);
  Group<T, V> low, high;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const bool twice = args.layout == NEIGHBOURS;
    low.elements[v] = narrow<T>(twice ? values[v / 2] : values[v]);
    high.elements[v] = narrow<T>(twice ? values[(V + v) / 2] : values[v]);
  }
  const int64_t first = args.layout == NEIGHBOURS ? 2 * at : at;
  *reinterpret_cast<Group<T, V>*>(to + first) = low;
  if (args.layout != PAIRS) {
    *reinterpret_cast<Group<T, V>*>(to + (args.layout == NEIGHBOURS ? first + V : at + args.pairs)) = high;
  }
}

// A thread has V angles of a token. What PyTorch's operations round, each by itself, is rounded here: the angle, its cosine,
// that times the scale, the result. cosf and sinf are the exact ones of CUDA, which PyTorch's have, too.
template <typename T, int V>
__global__ void __launch_bounds__(128) tabulate(const __grid_constant__ TablesArgs args) {
  wait_for_input();
  const int64_t groups = args.pairs / V, all = args.rows * groups;
  const int64_t width = args.layout == PAIRS ? args.pairs : 2 * args.pairs;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < all;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const bool small = (all >> 32) == 0; // division of 64 bits takes longer than all else
    const int64_t row = small ? static_cast<uint32_t>(i) / static_cast<uint32_t>(groups) : i / groups;
    const int64_t batch = small ? static_cast<uint32_t>(row) / static_cast<uint32_t>(args.tokens) : row / args.tokens;
    const int64_t first = (i - row * groups) * V, token = row - batch * args.tokens;
    const char* const at = args.positions + batch * args.batch + token * args.token;
    const float position = args.of_64_bits ? __ll2float_rn(*reinterpret_cast<const int64_t*>(at))
                                           : __int2float_rn(*reinterpret_cast<const int32_t*>(at));
    float cosines[V], sines[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float angle = __fmul_rn(position, read(args.inv_freq + (first + v) * args.step, args.of_inv_freq));
      cosines[v] = __fmul_rn(cosf(angle), args.scale);
      sines[v] = __fmul_rn(sinf(angle), args.scale);
    }
    const int64_t begin = row * width * static_cast<int64_t>(sizeof(T));
    write<T, V>(args.cos + begin, first, args, cosines);
    write<T, V>(args.sin + begin, first, args, sines);
  }
}

template <typename T, int V>
cudaError_t start(const TablesArgs& args, const Device& device) {
  constexpr int threads = 128;
  const int64_t blocks = (args.rows * (args.pairs / V) + threads - 1) / threads;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, 0x7fffffff)));
  return launch(tabulate<T, V>, grid, dim3(threads), 0, device, args);
}

} // namespace

int tables(const TablesArgs& args, Dtype dtype, const Device& device) {
  // One angle to a thread until every multiprocessor has some.
  const bool many = args.rows * args.pairs >= 1024 * static_cast<int64_t>(device.multiprocessors);
  return for_dtype(dtype, [&](auto of) {
    using T = decltype(of);
    return many && args.pairs % 4 == 0 ? start<T, 4>(args, device) : start<T, 1>(args, device);
  });
}

} // namespace kernelhub

#include <cfloat>

#include "launch.h"
#include "rows.cuh"
#include "team.cuh"

namespace kernelhub {

namespace {

// FAR: the mean is taken away before the product. After it, in one instruction, mean * scale has been rounded, which shows where
// the mean is far from zero beside the deviation.
template <typename T, int V, bool FAR>
__device__ __forceinline__ void finish(
    void* to, int64_t at, float mean, float scale, const Pack<T, V>& x, const Pack<T, V>& weight, const Pack<T, V>& bias) {
  float y[V], w[V], b[V];
  unpack(x, y);
  unpack(weight, w);
  unpack(bias, b);
  const float shift = -mean * scale;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    y[v] = fmaf(FAR ? (y[v] - mean) * scale : fmaf(y[v], scale, shift), w[v], b[v]);
  }
  store<T, V>(to, at, y);
}

// Pack i of a weight or bias that there may not be: then one that changes nothing, not even the sign of a zero.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> weight_at(const void* weight, int64_t i) {
  return weight != nullptr ? load<T, V>(weight, i) : filled<T, V>(1.0f);
}
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> bias_at(const void* bias, int64_t i) {
  return bias != nullptr ? load<T, V>(bias, i) : filled<T, V>(-0.0f);
}

// The variance, from the mean square of the differences from a mean that is wrong by `off`. Not below zero, where the two
// roundings may have it for a row of equal elements, beyond 1e9 by more than eps.
__device__ __forceinline__ float spread(float square, float off) {
  const float variance = fmaf(-off, off, square);
  return variance < 0.0f ? 0.0f : variance; // NaN stays
}

// As `unpack`, by instructions of which the assembler does not know that they give the same: over a sum it would keep the
// floats, in twice the registers that they came in.
template <typename T, int V>
__device__ __forceinline__ void unpack_for_now(const Pack<T, V>& from, float (&to)[V]) {
  if constexpr (V == 1 || !std::is_same_v<T, BFloat16>) {
    unpack(from, to);
  } else {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      to[2 * word] = __uint_as_float(__byte_perm(from.words[word], 0, 0x1044));
      to[2 * word + 1] = __uint_as_float(__byte_perm(from.words[word], 0, 0x3244));
    }
  }
}

// Where weight and bias are when the sums are known: in registers (where each thread has few), in shared memory, for the
// block's rows, or in global memory.
enum Place { REGISTERS, SHARED_MEMORY, GLOBAL_MEMORY };

// Rows of up to EACH packs to a thread, which are read once and held in registers. FULL: of exactly so many, by whole warps.
// In 16 bits the sums of elements and of squares are taken together. Where the mean is more than FAR times the deviation, the
// difference of mean square and squared mean has lost FAR**2 of its precision: there the squares of the differences from the
// mean are added up after all, as in float32. So are the differences, by whose mean the mean itself was rounded wrong: of a
// row of equal elements every difference is 0 then.
template <typename T, int V, int EACH, bool FULL, Place PLACE>
__global__ void __launch_bounds__(PLACE == SHARED_MEMORY ? 256 : EACH <= 2 ? 1024 : 512, PLACE == SHARED_MEMORY ? 4 : EACH == 4 ? 2 : 1)
    layer_rows(const __grid_constant__ LayerArgs args) {
  constexpr bool TOGETHER = sizeof(T) == 2, TIGHT = EACH == 4 && PLACE == GLOBAL_MEMORY; // TIGHT: in registers
  constexpr int AT_ONCE = PLACE == REGISTERS ? EACH : PLACE == GLOBAL_MEMORY && FULL ? 2 : 1; // packs of weight and bias
  constexpr float FAR = 8.0f;
  __shared__ __align__(16) float shared[2][SHARED<2>];
  extern __shared__ uint4 kept[];
  wait_for_input();
  // In registers few rows are: one to a block, whose barriers are no limit.
  constexpr int ROWS = PLACE == REGISTERS ? 15 : MOST_ROWS;
  const Team<ROWS, PLACE == SHARED_MEMORY ? 64 : FULL ? 32 : 1, PLACE == SHARED_MEMORY ? 128 : EACH <= 2 ? 1024 : 512> team;
  const int count = FULL ? EACH * team.across : static_cast<int>(args.n) / V;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (FULL && PLACE != SHARED_MEMORY && row >= args.rows) {
    return;
  }
  const int here = FULL || row < args.rows ? count : 0;
  const auto within = [&](int i) { return FULL || i < here; };
  const Pack<T, V> none = zeros<T, V>();
  Pack<T, V> x[EACH], weight[AT_ONCE], bias[AT_ONCE];
  const char* from = row_at(args.x, args.x_leading, PLACE == SHARED_MEMORY && row >= args.rows ? args.rows - 1 : row);
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int i = team.lane + k * team.across;
    x[k] = within(i) ? load<T, V>(from, i) : none;
  }
  if constexpr (PLACE == REGISTERS) {
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int i = team.lane + k * team.across;
      weight[k] = within(i) ? weight_at<T, V>(args.weight, i) : none;
      bias[k] = within(i) ? bias_at<T, V>(args.bias, i) : none;
    }
  } else if constexpr (PLACE == SHARED_MEMORY) {
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < count; i += blockDim.x * blockDim.y) {
      if (args.weight != nullptr) {
        copy_behind<true>(kept + i, static_cast<const uint4*>(args.weight) + i);
      } else {
        store<T, V>(kept, i, filled<T, V>(1.0f));
      }
      if (args.bias != nullptr) {
        copy_behind<true>(kept + count + i, static_cast<const uint4*>(args.bias) + i);
      } else {
        store<T, V>(kept + count, i, filled<T, V>(-0.0f));
      }
    }
    commit();
  }
  constexpr int CHAINS = 2; // of additions that wait for each other
  float sums[CHAINS] = {}, squares[CHAINS] = {};
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    float of[V];
    if constexpr (TIGHT) {
      unpack_for_now(x[k], of);
    } else {
      unpack(x[k], of);
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sums[v % CHAINS] += of[v];
      if constexpr (TOGETHER) {
        squares[v % CHAINS] = fmaf(of[v], of[v], squares[v % CHAINS]);
      }
    }
  }
  if constexpr (PLACE == SHARED_MEMORY) {
    wait_for_copies<0>();
    __syncthreads();
    if (row >= args.rows) {
      return;
    }
  }
  float totals[TOGETHER ? 2 : 1];
  totals[0] = sums[0] + sums[1];
  if constexpr (TOGETHER) {
    totals[1] = squares[0] + squares[1];
  }
  team.sum(totals, shared[0]);
  float mean = totals[0] * args.inverse, variance = 0.0f;
  bool far = true;
  if constexpr (TOGETHER) {
    variance = fmaf(-mean, mean, totals[1] * args.inverse);
    far = !(mean * mean <= FAR * FAR * variance && variance <= FLT_MAX); // also where the squares are not finite
  }
  if (!TOGETHER || __any_sync(0xffffffffu, far)) { // a warp may have several rows: each goes by its own
    float apart[2] = {};
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      if (within(team.lane + k * team.across)) {
        float of[V];
        if constexpr (TIGHT) {
          unpack_for_now(x[k], of);
        } else {
          unpack(x[k], of);
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float away = of[v] - mean;
          apart[0] += away;
          apart[1] = fmaf(away, away, apart[1]);
        }
      }
    }
    team.sum(apart, shared[1]);
    if (far) {
      const float off = apart[0] * args.inverse;
      mean += off;
      variance = spread(apart[1] * args.inverse, off);
    }
  }
  const float scale = rsqrtf(variance + args.eps);
  // THERE: weight and bias, and nothing has to be asked about them
  const auto write = [&](auto is_far, auto are_there) {
    constexpr bool IS_FAR = decltype(is_far)::value;
    [[maybe_unused]] constexpr bool THERE = decltype(are_there)::value;
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int i = team.lane + k * team.across;
      if constexpr (PLACE == SHARED_MEMORY) {
        weight[0] = load<T, V>(kept, i);
        bias[0] = load<T, V>(kept + count, i);
      } else if constexpr (PLACE == GLOBAL_MEMORY) {
        if (k % AT_ONCE == 0) { // none is asked for before the stores ahead of it in the program
#pragma unroll
          for (int j = 0; j < AT_ONCE; ++j) {
            const int at = i + j * team.across;
            if (within(at)) {
              weight[j] = THERE ? load<T, V>(args.weight, at) : weight_at<T, V>(args.weight, at);
              bias[j] = THERE ? load<T, V>(args.bias, at) : bias_at<T, V>(args.bias, at);
            }
          }
        }
      }
      if (within(i)) {
        finish<T, V, IS_FAR>(args.y, row * count + i, mean, scale, x[k], weight[k % AT_ONCE], bias[k % AT_ONCE]);
      }
    }
  };
  const bool there = PLACE != GLOBAL_MEMORY || (args.weight != nullptr && args.bias != nullptr);
  if (TOGETHER && !far && there) {
    write(std::false_type{}, std::true_type{});
  } else if (TOGETHER && !far) {
    write(std::false_type{}, std::false_type{});
  } else if (!TOGETHER && there) {
    write(std::true_type{}, std::true_type{});
  } else {
    write(std::true_type{}, std::false_type{});
  }
}

// Rows of any length and alignment, which are read three times.
template <typename T, int V>
__global__ void __launch_bounds__(1024) layer_long_rows(const __grid_constant__ LayerArgs args) {
  __shared__ __align__(16) float shared[2][SHARED<2>];
  wait_for_input();
  const Team<MOST_ROWS> team;
  const int64_t count = args.n / V;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < args.rows;
       first += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const int64_t here = row < args.rows ? count : 0;
    const char* from = here > 0 ? row_at(args.x, args.x_leading, row) : nullptr;
    float total[1] = {}, apart[2] = {}, of[V];
#pragma unroll 4
    for (int64_t i = team.lane; i < here; i += team.across) {
      unpack(load<T, V>(from, i), of);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        total[0] += of[v];
      }
    }
    team.sum(total, shared[0]);
    const float mean = total[0] * args.inverse;
#pragma unroll 4
    for (int64_t i = team.lane; i < here; i += team.across) {
      unpack(load<T, V>(from, i), of);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float away = of[v] - mean;
        apart[0] += away;
        apart[1] = fmaf(away, away, apart[1]);
      }
    }
    team.sum(apart, shared[1]);
    const float off = apart[0] * args.inverse;
    const float scale = rsqrtf(spread(apart[1] * args.inverse, off) + args.eps);
#pragma unroll 2
    for (int64_t i = team.lane; i < here; i += team.across) {
      finish<T, V, true>(
          args.y, row * count + i, mean + off, scale, load<T, V>(from, i), weight_at<T, V>(args.weight, i),
          bias_at<T, V>(args.bias, i));
    }
  }
}

template <typename T, int EACH>
cudaError_t run_rows(const LayerArgs& args, dim3 grid, dim3 block, const Device& device) {
  constexpr int V = WIDE<T>;
  constexpr Place PLACE = EACH <= 2 ? REGISTERS : GLOBAL_MEMORY;
  const bool full = block.x >= 32 && args.n == int64_t{EACH} * V * block.x;
  if constexpr (EACH == 4) {
    // Two rows of more than 256 packs share weight and bias: 8192 x 4096 in bfloat16 takes 33.7 us on an H200, without sharing
    // 34.7. Shorter rows and single ones lose by it.
    if (full && block.x > 64 && block.x <= 128 && block.y == 2) {
      const size_t kept = 2 * 16 * EACH * block.x;
      return launch(layer_rows<T, V, EACH, true, SHARED_MEMORY>, grid, block, kept, device, args);
    }
  }
  return full ? launch(layer_rows<T, V, EACH, true, PLACE>, grid, block, 0, device, args)
              : launch(layer_rows<T, V, EACH, false, PLACE>, grid, block, 0, device, args);
}

template <typename T>
cudaError_t run(const LayerArgs& args, bool wide, const Device& device) {
  constexpr int V = WIDE<T>;
  constexpr Habit HABIT{4, 4, 256};
  return cover_rows(args.rows, args.n, V, wide, 8, HABIT, device, [&](int each, dim3 grid, dim3 block) {
    switch (each) {
      case 1:
        return run_rows<T, 1>(args, grid, block, device);
      case 2:
        return run_rows<T, 2>(args, grid, block, device);
      case 4:
        return run_rows<T, 4>(args, grid, block, device);
      case 8:
        return run_rows<T, 8>(args, grid, block, device);
      default:
        return wide ? launch(layer_long_rows<T, V>, grid, block, 0, device, args)
                    : launch(layer_long_rows<T, 1>, grid, block, 0, device, args);
    }
  });
}

} // namespace

int layer(const LayerArgs& args, Dtype dtype, bool wide, const Device& device) {
  return for_dtype(dtype, [&](auto of) { return run<decltype(of)>(args, wide, device); });
}

} // namespace kernelhub

#include "launch.h"
#include "rows.cuh"

namespace kernelhub {

namespace {

// FAR: the mean is taken away before the product. After it, in one instruction, mean * scale has been rounded, which shows where
// the mean is far from zero beside the deviation.
template <typename T, int V, bool FAR>
__device__ __forceinline__ void finish(
    const LayerArgs& args, int64_t at, float mean, float scale, const Pack<T, V>& x, const Pack<T, V>& weight,
    const Pack<T, V>& bias) {
  float y[V];
  unpack(x, y);
  const float shift = -mean * scale;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    y[v] = FAR ? (y[v] - mean) * scale : fmaf(y[v], scale, shift);
  }
  float w[V], b[V];
  unpack(weight, w);
  unpack(bias, b);
  if (args.weight != nullptr && args.bias != nullptr) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      y[v] = fmaf(y[v], w[v], b[v]);
    }
  } else if (args.weight != nullptr) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      y[v] *= w[v];
    }
  } else if (args.bias != nullptr) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      y[v] += b[v];
    }
  }
  store<T, V>(args.y, at, y);
}

// Of a weight or bias that there may not be.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load_if(const void* from, int64_t i) {
  return from != nullptr ? load<T, V>(from, i) : zeros<T, V>();
}

// Rows of up to EACH packs to a thread, which are read once and held in registers. FULL: of exactly so many, by whole warps.
// In 16 bits the sums of elements and of squares are taken together. Where the mean is more than FAR times the deviation, the
// difference of mean square and squared mean has lost FAR**2 of its precision: there the squares of the differences from the
// mean are added up after all, as in float32. So are the differences, by whose mean the mean itself was rounded wrong: of a
// row of equal elements every difference is 0 then.
template <typename T, int V, int EACH, bool FULL>
__global__ void __launch_bounds__(EACH <= 2 ? 1024 : 512, EACH == 4 ? 2 : 1) layer_rows(const __grid_constant__ LayerArgs args) {
  constexpr bool TOGETHER = sizeof(T) == 2, EARLY = EACH <= 2; // EARLY: weight and bias, where few registers wait for them
  constexpr float FAR = 8.0f;
  __shared__ float shared[2][SHARED<2>];
  wait_for_input();
  const Team team;
  const int count = FULL ? EACH * team.across : static_cast<int>(args.n) / V;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (FULL && row >= args.rows) {
    return;
  }
  const int here = FULL || row < args.rows ? count : 0;
  const auto within = [&](int i) { return FULL || i < here; };
  const Pack<T, V> none = zeros<T, V>();
  Pack<T, V> x[EACH], weight[EARLY ? EACH : 1], bias[EARLY ? EACH : 1];
  const char* from = row_at(args.x, args.x_leading, row);
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int i = team.lane + k * team.across;
    x[k] = within(i) ? load<T, V>(from, i) : none;
  }
  if constexpr (EARLY) {
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int i = team.lane + k * team.across;
      weight[k] = within(i) ? load_if<T, V>(args.weight, i) : none;
      bias[k] = within(i) ? load_if<T, V>(args.bias, i) : none;
    }
  }
  float totals[TOGETHER ? 2 : 1] = {};
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    float of[V];
    unpack(x[k], of);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      totals[0] += of[v];
      if constexpr (TOGETHER) {
        totals[1] = fmaf(of[v], of[v], totals[1]);
      }
    }
    if constexpr (!EARLY) {
      forget(x[k]);
    }
  }
  team.sum(totals, shared[0]);
  float mean = totals[0] * args.inverse, variance = 0.0f;
  bool far = true;
  if constexpr (TOGETHER) {
    variance = fmaf(-mean, mean, totals[1] * args.inverse);
    far = !(mean * mean <= FAR * FAR * variance); // also where the squares are not finite
  }
  if (!TOGETHER || __any_sync(0xffffffffu, far)) { // a warp may have several rows: each goes by its own
    float apart[2] = {};
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      if (within(team.lane + k * team.across)) {
        float of[V];
        unpack(x[k], of);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float away = of[v] - mean;
          apart[0] += away;
          apart[1] = fmaf(away, away, apart[1]);
        }
      }
      if constexpr (!EARLY) {
        forget(x[k]);
      }
    }
    team.sum(apart, shared[1]);
    if (far) {
      const float off = apart[0] * args.inverse;
      mean += off;
      variance = fmaf(-off, off, apart[1] * args.inverse);
    }
  }
  const float scale = rsqrtf(variance + args.eps);
  const auto write = [&](auto is_far) {
    constexpr bool IS_FAR = decltype(is_far)::value;
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int i = team.lane + k * team.across;
      if (within(i)) {
        if constexpr (EARLY) {
          finish<T, V, IS_FAR>(args, row * count + i, mean, scale, x[k], weight[k], bias[k]);
        } else {
          finish<T, V, IS_FAR>(
              args, row * count + i, mean, scale, x[k], load_if<T, V>(args.weight, i), load_if<T, V>(args.bias, i));
        }
      }
    }
  };
  if (!TOGETHER || far) {
    write(std::true_type{});
  } else {
    write(std::false_type{});
  }
}

// Rows of any length and alignment, which are read three times.
template <typename T, int V>
__global__ void __launch_bounds__(1024) layer_long_rows(const __grid_constant__ LayerArgs args) {
  __shared__ float shared[2][SHARED<2>];
  wait_for_input();
  const Team team;
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
    const float scale = rsqrtf(fmaf(-off, off, apart[1] * args.inverse) + args.eps);
#pragma unroll 2
    for (int64_t i = team.lane; i < here; i += team.across) {
      finish<T, V, true>(
          args, row * count + i, mean + off, scale, load<T, V>(from, i), load_if<T, V>(args.weight, i),
          load_if<T, V>(args.bias, i));
    }
  }
}

template <typename T, int EACH>
cudaError_t run_rows(const LayerArgs& args, dim3 grid, dim3 block, const Device& device) {
  constexpr int V = WIDE<T>;
  return block.x >= 32 && args.n == int64_t{EACH} * V * block.x
      ? launch(layer_rows<T, V, EACH, true>, grid, block, 0, device, args)
      : launch(layer_rows<T, V, EACH, false>, grid, block, 0, device, args);
}

template <typename T>
cudaError_t run(const LayerArgs& args, bool wide, const Device& device) {
  constexpr int V = WIDE<T>;
  constexpr Habit HABIT{4, 4, 4, 256};
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

// RMS norms: of x, of x and what is added to it, and with a gate.

#pragma once

#include "launch.h"
#include "math.cuh"
#include "rows.cuh"
#include "team.cuh"

namespace kernelhub {

namespace {

// Writes one pack of the result: x / rms(x) times the weight, rounded in between where the args say so; times the gate.
template <typename T, int V, Kind KIND>
__device__ __forceinline__ void finish(
    const RmsArgs& args, int64_t at, float scale, const float (&x)[V], const Pack<T, V>& gate, const Pack<T, V>& weight) {
  float y[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    y[v] = x[v] * scale;
  }
  if (args.rounds && (KIND != GATED || args.gate == SILU_FIRST)) {
    store<T, V>(args.y, at, rounded_product<T, V>(y, weight));
    return;
  }
  if (args.rounds) {
    unpack(rounded_product<T, V>(y, weight), y);
  } else {
    float w[V];
    unpack(weight, w);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      y[v] *= w[v] + args.offset;
    }
  }
  if constexpr (KIND == GATED) {
    float z[V];
    unpack(gate, z);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      y[v] *= gate_value<T>(args.gate, z[v]);
    }
  }
  store<T, V>(args.y, at, y);
}

// What is normalised: x, or x times the gate's silu.
template <typename T, int V, Kind KIND>
__device__ __forceinline__ void input(const RmsArgs& args, const Pack<T, V>& x, const Pack<T, V>& gate, float (&to)[V]) {
  unpack(x, to);
  if constexpr (KIND == GATED) {
    if (args.gate == SILU_FIRST) {
      float z[V];
      unpack(gate, z);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        to[v] *= gate_value<T>(SILU, z[v]);
      }
    }
  }
}

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> added(const Pack<T, V>& a, const Pack<T, V>& b) {
  float x[V], y[V];
  unpack(a, x);
  unpack(b, y);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    x[v] += y[v];
  }
  return pack<T, V>(x);
}

template <int EACH, bool FULL>
constexpr int MOST_THREADS = EACH == 1 || (EACH == 2 && !FULL) ? 1024 : 512;

// Rows of up to EACH packs to a thread, which are read once and held in registers. FULL: of exactly so many, by whole warps;
// on H200 what there is to ask and to compute, not memory, is the limit otherwise.
template <typename T, int V, int EACH, Kind KIND, bool FULL>
__global__ void __launch_bounds__(MOST_THREADS<EACH, FULL>, EACH == 2 && FULL && KIND == PLAIN ? std::min(3, RESIDENT / 512) : EACH == 4 ? 2 : 1) rms_rows(const __grid_constant__ RmsArgs args) {
  constexpr bool EARLY = EACH <= 2; // the weight, where few registers wait for it
  __shared__ __align__(16) float shared[SHARED<1>];
  wait_for_input();
  const Team<MOST_ROWS, FULL ? 32 : 1, MOST_THREADS<EACH, FULL>> team;
  const int count = FULL ? EACH * team.across : static_cast<int>(args.n) / V;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (FULL && row >= args.rows) {
    return;
  }
  const int here = FULL || row < args.rows ? count : 0;
  const int64_t start = row * count;
  const auto within = [&](int i) { return FULL || i < here; };
  const Pack<T, V> none = zeros<T, V>();
  Pack<T, V> x[EACH], other[EACH], weight[EACH];
  const char* from = row_at(args.x, args.x_leading, row);
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int i = team.lane + k * team.across;
    x[k] = within(i) ? load<T, V>(from, i) : none;
  }
  if constexpr (KIND != PLAIN) {
    const char* others = row_at(args.other, args.other_leading, row);
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int i = team.lane + k * team.across;
      other[k] = within(i) ? load<T, V>(others, i) : none;
    }
  }
  const auto load_weight = [&]() {
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int i = team.lane + k * team.across;
      weight[k] = within(i) ? load<T, V>(args.weight, i) : none;
    }
  };
  if constexpr (EARLY) {
    load_weight();
  }
  constexpr int CHAINS = EACH <= 4 ? 2 : 1; // of additions that wait for each other
  float squares[1] = {}, chains[CHAINS] = {};
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    if constexpr (KIND == ADD) {
      x[k] = added(x[k], other[k]);
      const int i = team.lane + k * team.across;
      if (within(i)) {
        store<T, V>(args.sum, start + i, x[k]);
      }
    }
    float of[V];
    input<T, V, KIND>(args, x[k], other[k], of);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      chains[v % CHAINS] += of[v] * of[v];
    }
    if constexpr (!EARLY) {
      forget(x[k]);
    }
  }
#pragma unroll
  for (int chain = 0; chain < CHAINS; ++chain) {
    squares[0] += chains[chain];
  }
  team.sum(squares, shared);
  const float scale = rsqrtf(squares[0] * args.inverse + args.eps);
  if constexpr (!EARLY) {
    load_weight();
  }
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int i = team.lane + k * team.across;
    if (within(i)) {
      float of[V];
      input<T, V, KIND>(args, x[k], other[k], of);
      finish<T, V, KIND>(args, start + i, scale, of, other[k], weight[k]);
    }
  }
}

// Many rows of EACH packs to a thread, which a block reads twice, from a cache the second time: in so few registers that a
// multiprocessor has all threads that it can have, or, of four packs each, those of three blocks.
template <typename T, int V, int EACH>
__global__ void __launch_bounds__(512, EACH == 4 ? std::min(3, RESIDENT / 512) : RESIDENT / 512) rms_rows_twice(const __grid_constant__ RmsArgs args) {
  __shared__ __align__(16) float shared[SHARED<1>];
  wait_for_input();
  const Team<1, 32, 512> team;
  const int64_t row = blockIdx.x, start = row * (EACH * team.across);
  const char* from = row_at(args.x, args.x_leading, row);
  Pack<T, V> x[EACH];
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    x[k] = load_hinted<T, V, false>(from, team.lane + k * team.across);
  }
  float squares[1] = {}, chains[2] = {};
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    float of[V];
    unpack(x[k], of);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      chains[v % 2] += of[v] * of[v];
    }
  }
  squares[0] = chains[0] + chains[1];
  team.sum(squares, shared);
  const float scale = rsqrtf(squares[0] * args.inverse + args.eps);
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int i = team.lane + k * team.across;
    const Pack<T, V> weight = load_hinted<T, V, false>(args.weight, i);
    float of[V];
    unpack(load_hinted<T, V, true>(from, i), of);
    finish<T, V, PLAIN>(args, start + i, scale, of, weight, weight);
  }
}

// Rows of any length and alignment, which are read twice.
template <typename T, int V, Kind KIND>
__global__ void __launch_bounds__(1024) rms_long_rows(const __grid_constant__ RmsArgs args) {
  __shared__ __align__(16) float shared[2][SHARED<1>];
  wait_for_input();
  const Team<MOST_ROWS> team;
  const int64_t count = args.n / V;
  int turn = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < args.rows;
       first += static_cast<int64_t>(gridDim.x) * blockDim.y, turn ^= 1) {
    const int64_t row = first + threadIdx.y;
    const int64_t here = row < args.rows ? count : 0, start = row * count;
    const char* from = here > 0 ? row_at(args.x, args.x_leading, row) : nullptr;
    const char* others = KIND != PLAIN && here > 0 ? row_at(args.other, args.other_leading, row) : nullptr;
    float squares[1] = {};
#pragma unroll 4
    for (int64_t i = team.lane; i < here; i += team.across) {
      Pack<T, V> x = load<T, V>(from, i), other;
      if constexpr (KIND != PLAIN) {
        other = load<T, V>(others, i);
      }
      if constexpr (KIND == ADD) {
        x = added(x, other);
        store<T, V>(args.sum, start + i, x);
      }
      float of[V];
      input<T, V, KIND>(args, x, other, of);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        squares[0] += of[v] * of[v];
      }
    }
    team.sum(squares, shared[turn]);
    const float scale = rsqrtf(squares[0] * args.inverse + args.eps);
#pragma unroll 4
    for (int64_t i = team.lane; i < here; i += team.across) {
      const Pack<T, V> x = KIND == ADD ? load<T, V>(args.sum, start + i) : load<T, V>(from, i);
      const Pack<T, V> weight = load<T, V>(args.weight, i);
      Pack<T, V> other;
      if constexpr (KIND == GATED) {
        other = load<T, V>(others, i);
      }
      float of[V];
      input<T, V, KIND>(args, x, other, of);
      finish<T, V, KIND>(args, start + i, scale, of, other, weight);
    }
  }
}

template <typename T, int EACH, Kind KIND>
cudaError_t run_rows(const RmsArgs& args, dim3 grid, dim3 block, const Device& device) {
  constexpr int V = WIDE<T>;
  if (block.x >= 32 && block.x * block.y <= MOST_THREADS<EACH, true> && args.n == int64_t{EACH} * V * block.x) {
    return launch(rms_rows<T, V, EACH, KIND, true>, grid, block, 0, device, args);
  }
  return launch(rms_rows<T, V, EACH, KIND, false>, grid, block, 0, device, args);
}

// How many packs of a row a thread takes where the row is read twice; 0 where it is not. On H200 that makes 16384 x 8192 1.5 %
// faster, and what comes before and after it no slower; of half as much, the caches that it leaves behind cost that 1 %.
template <typename T>
int each_twice(const RmsArgs& args, const Device& device) {
  const int64_t parts = args.n / WIDE<T>, bytes = 16 * parts * args.rows;
  if (!few(args.rows, device) && args.rows <= 0x7fffffff && bytes >= int64_t{4} * device.cache && parts > 512) {
    for (const int each : {2, 3, 4}) {
      if (parts % (32 * each) == 0 && parts <= 512 * each) {
        return each;
      }
    }
  }
  return 0;
}

template <typename T, Kind KIND>
cudaError_t run(const RmsArgs& args, bool wide, const Device& device) {
  constexpr int V = WIDE<T>;
  if constexpr (KIND == PLAIN) {
    const int each = wide ? each_twice<T>(args, device) : 0;
    const dim3 grid(static_cast<unsigned>(args.rows)), block(static_cast<unsigned>(each > 0 ? args.n / V / each : 0));
    switch (each) {
      case 2:
        return launch(rms_rows_twice<T, V, 2>, grid, block, 0, device, args);
      case 3:
        return launch(rms_rows_twice<T, V, 3>, grid, block, 0, device, args);
      case 4:
        return launch(rms_rows_twice<T, V, 4>, grid, block, 0, device, args);
      default:
        break;
    }
  }
  // Of a gate up to 512 packs: 8192 x 4096 takes 50 us on an H200, by 4 packs to a thread 54.
  const Habit habit = KIND == GATED && args.n <= 512 * V ? Habit{2, 2, 256} : Habit{KIND == PLAIN ? 2 : 4, 4, 512};
  return cover_rows(args.rows, args.n, V, wide, KIND == PLAIN ? 8 : 4, habit, device, [&](int each, dim3 grid, dim3 block) {
    switch (each) {
      case 1:
        return run_rows<T, 1, KIND>(args, grid, block, device);
      case 2:
        return run_rows<T, 2, KIND>(args, grid, block, device);
      case 4:
        return run_rows<T, 4, KIND>(args, grid, block, device);
      case 8:
        if constexpr (KIND == PLAIN) {
          return run_rows<T, 8, KIND>(args, grid, block, device);
        }
      default:
        return wide ? launch(rms_long_rows<T, V, KIND>, grid, block, 0, device, args)
                    : launch(rms_long_rows<T, 1, KIND>, grid, block, 0, device, args);
    }
  });
}

} // namespace

} // namespace kernelhub

// Gradients of the norms. With g = grad * weight and h = (x - mean) / rms, that of the input is
// (g - mean(g) - h * mean(g * h)) / rms, without the means where the norm takes off none, and the weight's is the sum over
// the rows of grad * h.

#pragma once

#include <algorithm>
#include <atomic>
#include <cfloat>

#include "launch.h"
#include "math.cuh"
#include "rows.cuh"
#include "team.cuh"

namespace kernelhub {

namespace {

// What a row's statistics come to: x -> (x - mean) * scale = h, and the input's gradient is (g - back * h - constant) * scale.
struct Found {
  float mean, scale, back, constant;
};

// One pack of a row, widened: x as it is normalised (with the gate in it, where that comes first), g, and what the weight
// is multiplied with to give g (grad, or grad times the gate); and the gate.
template <int V>
struct Part {
  float x[V], g[V], by[V];
  Gated gate[V];
};

template <typename T, int V, Kind KIND>
__device__ __forceinline__ Part<V> part(
    const BackwardArgs& args, const Pack<T, V>& grad, const Pack<T, V>& x, const Pack<T, V>& gate, const Pack<T, V>& weight) {
  Part<V> of;
  unpack(grad, of.by);
  unpack(x, of.x);
  float w[V];
  unpack(weight, w);
  if constexpr (KIND == GATED) {
    float z[V];
    unpack(gate, z);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      of.gate[v] = gate_of<T>(args.gate, z[v]);
      if (args.gate == SILU_FIRST) {
        of.x[v] *= of.gate[v].value;
      } else {
        of.by[v] *= of.gate[v].value;
      }
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    of.g[v] = __fmul_rn(of.by[v], w[v] + args.offset); // not part of a fused sum: where a mean cancels it, to nothing
  }
  return of;
}

// What is added up over a row: the squares of x and g * x; for a layer norm, about a mean, x, its squares, g and g * x.
template <Kind KIND>
constexpr int ROW_SUMS = KIND == LAYER ? 4 : 2;

template <Kind KIND, int V>
__device__ __forceinline__ void add(const Part<V>& of, float mean, float (&sums)[ROW_SUMS<KIND>]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if constexpr (KIND == LAYER) {
      const float x = of.x[v] - mean;
      sums[0] += x;
      sums[1] = fmaf(x, x, sums[1]);
      sums[2] += of.g[v];
      sums[3] = fmaf(of.g[v], x, sums[3]);
    } else {
      sums[0] += of.x[v] * of.x[v];
      sums[1] += of.g[v] * of.x[v];
    }
  }
}

// From the sums over the row, for which `about` asks: about zero, and of a layer norm about the mean once more in float32, or
// where the mean is more than FAR times the deviation. In 16 bits that is seldom; nearer by, the differences of the sums about
// zero have lost at most FAR**2 of their precision (see `layer_rows`). The mean's own rounding, which shows where it is far, is
// the mean of the differences, and is taken back.
template <typename T, Kind KIND, typename About>
__device__ __forceinline__ Found find(const BackwardArgs& args, const About& about) {
  Found found{};
  float sums[ROW_SUMS<KIND>] = {};
  about(0.0f, sums);
  if constexpr (KIND == LAYER) {
    constexpr float FAR = 8.0f;
    float off = sums[0] * args.inverse, variance = fmaf(-off, off, sums[1] * args.inverse);
    found.mean = off;
    // also where the squares are not finite
    const bool far = sizeof(T) == 4 || !(off * off <= FAR * FAR * variance && variance <= FLT_MAX);
    if (__any_sync(0xffffffffu, far)) { // a warp may have several rows: each goes by its own
      float again[4] = {};
      about(found.mean, again);
      if (far) {
        off = again[0] * args.inverse;
        found.mean += off;
        variance = fmaxf(fmaf(-off, off, again[1] * args.inverse), 0.0f);
        sums[3] = again[3];
      }
    }
    found.scale = rsqrtf(variance + args.eps);
    found.back = fmaf(-off, sums[2], sums[3]) * found.scale * args.inverse;
    found.constant = sums[2] * args.inverse;
  } else {
    found.scale = rsqrtf(sums[0] * args.inverse + args.eps);
    found.back = sums[1] * found.scale * args.inverse;
  }
  return found;
}

// Writes the gradients of the input (and the gate) for one pack.
template <typename T, int V, Kind KIND>
__device__ __forceinline__ void finish(
    const BackwardArgs& args, int64_t at, const Found& found, const Part<V>& of, const Pack<T, V>& grad, const Pack<T, V>& x,
    const Pack<T, V>& other, const Pack<T, V>& weight) {
  float to[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const float h = (of.x[v] - found.mean) * found.scale;
    to[v] = (of.g[v] - found.constant - h * found.back) * found.scale;
  }
  if constexpr (KIND == ADD) {
    float too[V];
    unpack(other, too);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      to[v] += too[v];
    }
  }
  if constexpr (KIND == GATED) {
    float gate_grad[V], a[V], b[V];
    if (args.gate == SILU_FIRST) {
      unpack(x, a);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        gate_grad[v] = to[v] * a[v] * of.gate[v].slope;
        to[v] *= of.gate[v].value;
      }
    } else {
      unpack(grad, a);
      unpack(weight, b);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        gate_grad[v] = a[v] * (of.x[v] * found.scale) * (b[v] + args.offset) * of.gate[v].slope;
      }
    }
    store<T, V>(args.gate_grad, at, gate_grad);
  }
  store<T, V>(args.x_grad, at, to);
}

constexpr int BACKWARD_THREADS = 512;
constexpr int SUMS_BYTES = 2 * SHARED<4> * sizeof(float); // of shared memory, at most

template <Kind KIND>
constexpr int ARRAYS = KIND == ADD || KIND == GATED ? 3 : 2; // what is read of each row: x, grad, the other operand

// Blocks that stay and go through rows, up to EACH packs of them to a thread, and add up their part of the weight's gradient
// in registers. The rows to come are copied to shared memory meanwhile, each pack by the thread that will use it: memory is
// kept busy over the two or three times that a row's threads wait for each other, without a register. Half of the threads that
// a multiprocessor has room for, with twice the registers, are 10 % faster on H200 than all.
template <typename T, int V, int EACH, Kind KIND, int STAGES>
__global__ void __launch_bounds__(BACKWARD_THREADS) backward_rows(const __grid_constant__ BackwardArgs args) {
  constexpr int SUMS = KIND == LAYER ? 2 : 1;
  __shared__ __align__(16) float shared[2][SHARED<ROW_SUMS<KIND>>];
  extern __shared__ uint4 ring[];
  wait_for_input();
  const Team<15> team;
  const int count = static_cast<int>(args.n) / V, threads = blockDim.x * blockDim.y;
  uint4* const mine = ring + threadIdx.y * blockDim.x + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y;
  const auto slot = [&](int stage, int array, int k) { return mine + ((stage * ARRAYS<KIND> + array) * EACH + k) * threads; };
  const auto fetch = [&](int64_t from, int stage) {
    const int64_t row = from + threadIdx.y;
    if (row < args.rows) {
      const char* x = row_at(args.x, args.x_leading, row);
      const char* grad = row_at(args.grad, args.grad_leading, row);
      const char* other = ARRAYS<KIND> == 3 ? row_at(args.other, args.other_leading, row) : nullptr;
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        const int i = team.lane + k * team.across;
        if (i < count) {
          copy_behind(slot(stage, 0, k), x + i * 16);
          copy_behind(slot(stage, 1, k), grad + i * 16);
          if constexpr (ARRAYS<KIND> == 3) {
            copy_behind(slot(stage, 2, k), other + i * 16);
          }
        }
      }
    }
    commit();
  };
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    fetch(first + stage * stride, stage);
  }
  Pack<T, V> weight[EACH];
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int i = team.lane + k * team.across;
    weight[k] = args.weight == nullptr ? filled<T, V>(1.0f) : i < count ? load<T, V>(args.weight, i) : zeros<T, V>();
  }
  float sums[SUMS][EACH][V] = {};
  int turn = 0, stage = 0; // turn: of `shared`, which no two sums running have the same half of
  for (int64_t begin = first; begin < args.rows; begin += stride) {
    fetch(begin + (STAGES - 1) * stride, stage == 0 ? STAGES - 1 : stage - 1);
    wait_for_copies<STAGES - 1>();
    const int64_t row = begin + threadIdx.y;
    const int here = row < args.rows ? count : 0;
    const auto each = [&](const auto& use) {
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        const int i = team.lane + k * team.across;
        if (i < here) {
          const Pack<T, V> x = load<T, V>(slot(stage, 0, k), 0), grad = load<T, V>(slot(stage, 1, k), 0);
          Pack<T, V> other;
          if constexpr (ARRAYS<KIND> == 3) {
            other = load<T, V>(slot(stage, 2, k), 0);
          }
          use(k, i, part<T, V, KIND>(args, grad, x, other, weight[k]), grad, x, other);
          forget(weight[k]);
        }
      }
    };
    const Found found = find<T, KIND>(args, [&](float mean, auto& sums) {
      each([&](int, int, const Part<V>& of, const auto&...) { add<KIND>(of, mean, sums); });
      team.sum(sums, shared[turn]);
      turn ^= 1;
    });
    each([&](int k, int i, const Part<V>& of, const Pack<T, V>& grad, const Pack<T, V>& x, const Pack<T, V>& other) {
      finish<T, V, KIND>(args, row * count + i, found, of, grad, x, other, weight[k]);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sums[0][k][v] += of.by[v] * ((of.x[v] - found.mean) * found.scale);
        if constexpr (SUMS == 2) {
          sums[1][k][v] += of.by[v];
        }
      }
    });
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }
  wait_for_copies<0>();
  float* const gathered = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int s = 0; s < SUMS; ++s) {
    float* to = s == 0 ? args.weight_sums : args.bias_sums;
    if (to == nullptr) {
      continue;
    }
    to += static_cast<int64_t>(blockIdx.x) * args.n;
    const bool one = blockDim.y == 1;
    float* const at = one ? to : gathered + static_cast<int>(threadIdx.y) * count * V;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int i = team.lane + k * team.across;
      if (i < count) {
#pragma unroll
        for (int v = 0; v < V; v += 4) {
          *reinterpret_cast<float4*>(at + i * V + v) =
              make_float4(sums[s][k][v], sums[s][k][v + 1], sums[s][k][v + 2], sums[s][k][v + 3]);
        }
      }
    }
    if (!one) { // the block's rows first, so that fewer parts are written and read again
      __syncthreads();
      for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < count * V; i += threads) {
        float total = 0.0f;
        for (int y = 0; y < static_cast<int>(blockDim.y); ++y) {
          total += gathered[y * count * V + i];
        }
        to[i] = total;
      }
    }
  }
}

// Rows of any length and alignment: the input's gradient, and the statistics for `backward_columns`.
template <typename T, int V, Kind KIND>
__global__ void __launch_bounds__(1024) backward_long_rows(const __grid_constant__ BackwardArgs args) {
  __shared__ __align__(16) float shared[2][SHARED<ROW_SUMS<KIND>>];
  wait_for_input();
  const Team<15> team;
  const int64_t count = args.n / V;
  int turn = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < args.rows;
       first += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const int64_t here = row < args.rows ? count : 0;
    const char* from = here > 0 ? row_at(args.x, args.x_leading, row) : nullptr;
    const char* grads = here > 0 ? row_at(args.grad, args.grad_leading, row) : nullptr;
    const char* others = (KIND == ADD || KIND == GATED) && here > 0 ? row_at(args.other, args.other_leading, row) : nullptr;
    const auto each = [&](const auto& use) {
#pragma unroll 2
      for (int64_t i = team.lane; i < here; i += team.across) {
        const Pack<T, V> x = load<T, V>(from, i), grad = load<T, V>(grads, i);
        const Pack<T, V> weight = args.weight == nullptr ? filled<T, V>(1.0f) : load<T, V>(args.weight, i);
        Pack<T, V> other;
        if constexpr (KIND == ADD || KIND == GATED) {
          other = load<T, V>(others, i);
        }
        use(i, part<T, V, KIND>(args, grad, x, other, weight), grad, x, other, weight);
      }
    };
    const Found found = find<T, KIND>(args, [&](float mean, auto& sums) {
      each([&](int64_t, const Part<V>& of, const auto&...) { add<KIND>(of, mean, sums); });
      team.sum(sums, shared[turn]);
      turn ^= 1;
    });
    each([&](int64_t i, const Part<V>& of, const auto&... packs) {
      finish<T, V, KIND>(args, row * count + i, found, of, packs...);
    });
    if (args.statistics != nullptr && here > 0 && team.lane == 0) {
      args.statistics[2 * row] = found.mean;
      args.statistics[2 * row + 1] = found.scale;
    }
  }
}

// The weight's and the bias's sums: blockIdx.y is the part of the rows, threadIdx.y goes through them.
template <typename T, int V, Kind KIND>
__global__ void __launch_bounds__(256) backward_columns(const __grid_constant__ BackwardArgs args) {
  __shared__ float shared[2][8][32][V + 1];
  wait_for_input();
  const int64_t count = args.n / V, i = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  const int64_t each = (args.rows + gridDim.y - 1) / gridDim.y, begin = each * blockIdx.y;
  const int64_t end = begin + each < args.rows ? begin + each : args.rows;
  float weight[V] = {}, bias[V] = {};
  if (i < count) {
    for (int64_t row = begin + threadIdx.y; row < end; row += 8) {
      const Pack<T, V> x = load<T, V>(row_at(args.x, args.x_leading, row), i), grad = load<T, V>(row_at(args.grad, args.grad_leading, row), i);
      Pack<T, V> other;
      if constexpr (KIND == GATED) {
        other = load<T, V>(row_at(args.other, args.other_leading, row), i);
      }
      const float mean = args.statistics[2 * row], scale = args.statistics[2 * row + 1];
      const Part<V> of = part<T, V, KIND>(args, grad, x, other, zeros<T, V>());
#pragma unroll
      for (int v = 0; v < V; ++v) {
        weight[v] += of.by[v] * ((of.x[v] - mean) * scale);
        bias[v] += of.by[v];
      }
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    shared[0][threadIdx.y][threadIdx.x][v] = weight[v];
    shared[1][threadIdx.y][threadIdx.x][v] = bias[v];
  }
  __syncthreads();
  const int which = threadIdx.y;
  float* to = which == 0 ? args.weight_sums : args.bias_sums;
  if (which < 2 && to != nullptr && i < count) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float total = 0.0f;
      for (int y = 0; y < 8; ++y) {
        total += shared[which][y][threadIdx.x][v];
      }
      to[static_cast<int64_t>(blockIdx.y) * args.n + i * V + v] = total;
    }
  }
}

// How many bytes of shared memory `backward_rows` needs for each thread.
inline int ring_bytes(Kind kind, int each, int stages) { return stages * (kind == ADD || kind == GATED ? 3 : 2) * each * 16; }

template <typename T, int EACH, int STAGES, Kind KIND>
cudaError_t run_rows(const BackwardArgs& args, const BackwardPlan& plan, const Device& device) {
  static std::atomic<uint64_t> allowed{0}; // by device: more than 48 KB of shared memory must be asked for, once
  const auto kernel = backward_rows<T, WIDE<T>, EACH, KIND, STAGES>;
  const uint64_t bit = uint64_t{1} << device.index;
  if ((allowed.load(std::memory_order_relaxed) & bit) == 0) {
    const int most = std::min(device.shared - SUMS_BYTES, ring_bytes(KIND, EACH, STAGES) * BACKWARD_THREADS);
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)) {
      return error;
    }
    allowed.fetch_or(bit);
  }
  const size_t shared = static_cast<size_t>(ring_bytes(KIND, EACH, STAGES)) * plan.across * plan.together;
  return launch(kernel, dim3(static_cast<unsigned>(plan.parts)), dim3(plan.across, plan.together), shared, device, args);
}

template <typename T, Kind KIND>
cudaError_t run_backward(const BackwardArgs& args, bool wide, const BackwardPlan& plan, const Device& device) {
  constexpr int V = WIDE<T>;
  switch (plan.each) {
    case 1:
      return run_rows<T, 1, 3, KIND>(args, plan, device);
    case 2:
      return run_rows<T, 2, 3, KIND>(args, plan, device);
    case 4:
      return run_rows<T, 4, 2, KIND>(args, plan, device);
    default:
      break;
  }
  const dim3 block(plan.across, plan.together);
  const Cover to = cover(args.rows, plan.across, plan.across * plan.together);
  const cudaError_t done = wide ? launch(backward_long_rows<T, V, KIND>, dim3(to.blocks), block, 0, device, args)
                                : launch(backward_long_rows<T, 1, KIND>, dim3(to.blocks), block, 0, device, args);
  if (done != cudaSuccess || args.statistics == nullptr) {
    return done;
  }
  const int64_t count = wide ? args.n / V : args.n;
  const dim3 grid(static_cast<unsigned>((count + 31) / 32), static_cast<unsigned>(plan.parts));
  return wide ? launch(backward_columns<T, V, KIND == ADD ? PLAIN : KIND>, grid, dim3(32, 8), 0, device, args)
              : launch(backward_columns<T, 1, KIND == ADD ? PLAIN : KIND>, grid, dim3(32, 8), 0, device, args);
}

} // namespace

} // namespace kernelhub

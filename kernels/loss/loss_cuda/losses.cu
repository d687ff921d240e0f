#include <cmath>

#include "launch.h"
#include "rows.cuh"

namespace kernelhub {

namespace {

constexpr float LEAST = -INFINITY;

// What the gradient of a row is made of: scale * (exp(x - most) * inverse - more at the label) - less.
struct Gradient {
  float most, inverse, scale, less, more;
};

__device__ __forceinline__ Gradient gradient_of(const LossArgs& args, float most, float inverse, float scale) {
  Gradient of{most, inverse, scale, 0.0f, 1.0f};
  if (args.z != 0.0) {
    const double log_sum = most - log(static_cast<double>(inverse));
    of.inverse = static_cast<float>(inverse * (1.0 + 2.0 * args.z * log_sum));
  }
  if (args.smoothing != 0.0) {
    of.less = static_cast<float>(scale * args.smoothing / static_cast<double>(args.n));
    of.more = static_cast<float>(1.0 - args.smoothing);
  }
  return of;
}

// The largest element; NaNs are passed over, they show in the sum.
template <typename T, int V>
__device__ __forceinline__ float most_of(const Pack<T, V>& x) {
  if constexpr (V == 1) {
    return widen(x.value);
  } else if constexpr (sizeof(T) == 4) {
    float y[V];
    unpack(x, y);
    return fmaxf(fmaxf(y[0], y[1]), fmaxf(y[2], y[3]));
  } else {
    using Two = std::conditional_t<std::is_same_v<T, BFloat16>, __nv_bfloat162, __half2>;
    const auto two = [&](int word) { return *reinterpret_cast<const Two*>(&x.words[word]); };
    const Two most = __hmax2(__hmax2(two(0), two(1)), __hmax2(two(2), two(3)));
    return fmaxf(widen(most.x), widen(most.y));
  }
}

// The gradient of one pack; `label` is its place in the pack, or elsewhere.
template <typename T, int V>
__device__ __forceinline__ void write_gradient(void* to, int64_t i, const Pack<T, V>& x, const Gradient& of, int64_t label) {
  float y[V];
  unpack(x, y);
  const float factor = of.inverse * of.scale;
  if (label < 0 || label >= V) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      y[v] = exponential<T>(y[v] - of.most) * factor - of.less;
    }
  } else { // one pack of a row
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float e = exponential<T>(y[v] - of.most);
      y[v] = v == static_cast<int>(label) ? (e * of.inverse - of.more) * of.scale - of.less : e * factor - of.less;
    }
  }
  store<T, V>(to, i, y);
}

template <typename N, typename Merge>
__device__ __forceinline__ N over_warp(N of, const Merge& merge) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    of = merge(of, __shfl_xor_sync(0xffffffffu, of, offset));
  }
  return of;
}

// The same over a block of whole warps, the same for all; `shared` is for 32, and not the same twice running.
template <typename N, typename Merge>
__device__ __forceinline__ N over_block(N of, N none, N* shared, const Merge& merge) {
  of = over_warp(of, merge);
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (lane == 0) {
    shared[threadIdx.x / 32] = of;
  }
  __syncthreads();
  return over_warp(lane < warps ? shared[lane] : none, merge);
}

// A label that is no class stops the GPU's work, as it does for PyTorch.
__device__ __forceinline__ int64_t label_of(const LossArgs& args, int64_t row) {
  const int64_t label = args.labels[row];
  if (label != args.ignore_index && (label < 0 || label >= args.n)) {
    asm volatile("trap;");
  }
  return label;
}

// Packs that a thread asks for before it needs the first: memory is kept busy, where one after another is 1.2 to 1.65 times as long.
constexpr int EACH = 4;

// A block to a row, which is read once for its sums, and, if the gradient is asked for, once more.
template <typename T, int V, bool WITH_GRADIENT>
__global__ void __launch_bounds__(1024) loss_rows(const __grid_constant__ LossArgs args) {
  __shared__ float shared[32];
  __shared__ double shared_sums[2][32];
  wait_for_input();
  const int64_t row = blockIdx.x, count = args.n / V;
  const int64_t label = label_of(args, row);
  char* const grad = static_cast<char*>(args.grad) + row * args.n * static_cast<int64_t>(sizeof(T));
  if (label == args.ignore_index) {
    if (threadIdx.x == 0) {
      args.losses[row] = 0.0f;
      if (args.kept != nullptr) {
        args.kept[2 * row] = args.kept[2 * row + 1] = 0.0f;
      }
    }
    if constexpr (WITH_GRADIENT) {
      for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
        store<T, V>(grad, i, zeros<T, V>());
      }
    }
    return;
  }
  const char* from = row_at(args.logits, args.logits_leading, row);
  const bool smooth = args.smoothing != 0.0;
  float most = LEAST, total = 0.0f, plain = 0.0f;
  for (int64_t first = threadIdx.x; first < count; first += EACH * blockDim.x) {
    Pack<T, V> x[EACH];
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int64_t i = first + k * blockDim.x;
      x[k] = i < count ? load<T, V>(from, i) : filled<T, V>(LEAST);
    }
    float found = most;
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      found = fmaxf(found, most_of(x[k])); // passes over NaNs too
    }
    if (found > most) {
      total *= exponential<T>(most - found); // of -inf: 0
      most = found;
    }
    const float shift = most == LEAST ? 0.0f : most;
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      float y[V];
      unpack(x[k], y);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        total += exponential<T>(y[v] - shift);
      }
      if (smooth && first + k * blockDim.x < count) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          plain += y[v];
        }
      }
    }
  }
  const float all = over_block(most, LEAST, shared, [](float a, float b) { return fmaxf(a, b); });
  const auto add = [](double a, double b) { return a + b; };
  const float part = total == 0.0f ? 0.0f : total * expf(most - all);
  double sum = over_block(static_cast<double>(part), 0.0, shared_sums[0], add);
  double mean = 0.0;
  if (smooth) {
    mean = over_block(static_cast<double>(plain), 0.0, shared_sums[1], add) / static_cast<double>(args.n);
  }
  // Nothing but -inf has no largest: 0 / 0 in the formula.
  sum = all == LEAST ? static_cast<double>(NAN) : sum;
  const float inverse = static_cast<float>(1.0 / sum);
  float at_label[1];
  unpack(load<T, 1>(from, label), at_label);
  if (threadIdx.x == 0) {
    const double log_sum = log(sum);
    // Beside large logits the logarithm would be lost, so it is added last.
    double loss = (static_cast<double>(all) - at_label[0]) + log_sum;
    if (smooth) {
      loss = (1.0 - args.smoothing) * loss + args.smoothing * (log_sum - (mean - all));
    }
    if (args.z != 0.0) {
      loss += args.z * (all + log_sum) * (all + log_sum);
    }
    args.losses[row] = static_cast<float>(loss);
    if (args.kept != nullptr) {
      args.kept[2 * row] = all;
      args.kept[2 * row + 1] = inverse;
    }
  }
  if constexpr (WITH_GRADIENT) {
    const Gradient of = gradient_of(args, all, inverse, args.scale[row]);
    __syncthreads(); // the label's logit has been read by all, before it is written over
    for (int64_t first = threadIdx.x; first < count; first += EACH * blockDim.x) {
      Pack<T, V> x[EACH];
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        const int64_t i = first + k * blockDim.x;
        x[k] = i < count ? load<T, V>(from, i) : zeros<T, V>();
      }
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        const int64_t i = first + k * blockDim.x;
        if (i < count) {
          write_gradient<T, V>(grad, i, x[k], of, label - i * V);
        }
      }
    }
  }
}

constexpr int THREADS = 256;

// THREADS * EACH packs of a row to a block.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS) gradient_parts(const __grid_constant__ LossArgs args) {
  wait_for_input();
  const int64_t count = args.n / V, parts = (count + THREADS * EACH - 1) / (THREADS * EACH);
  for (int64_t block = blockIdx.x; block < args.rows * parts; block += gridDim.x) {
    const int64_t row = block / parts, first = (block - row * parts) * (THREADS * EACH) + threadIdx.x;
    const int64_t label = label_of(args, row), start = row * count;
    const bool ignored = label == args.ignore_index;
    const char* from = row_at(args.logits, args.logits_leading, row);
    Pack<T, V> x[EACH];
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int64_t i = first + k * THREADS;
      x[k] = !ignored && i < count ? load<T, V>(from, i) : zeros<T, V>();
    }
    const Gradient of = gradient_of(args, args.kept[2 * row], args.kept[2 * row + 1], args.scale[row]);
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int64_t i = first + k * THREADS;
      if (i < count) {
        if (ignored) {
          store<T, V>(args.grad, start + i, x[k]);
        } else {
          write_gradient<T, V>(args.grad, start + i, x[k], of, label - i * V);
        }
      }
    }
  }
}

// All of x times one number, in float32; where that is 1 nothing is read or written.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS) scale_packs(const __grid_constant__ ScaleArgs args) {
  wait_for_input();
  const float by = *args.by;
  if (by == 1.0f) {
    return;
  }
  const int64_t count = args.n / V, step = static_cast<int64_t>(gridDim.x) * THREADS * EACH;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * THREADS * EACH + threadIdx.x; first < count; first += step) {
    Pack<T, V> x[EACH];
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int64_t i = first + k * THREADS;
      x[k] = i < count ? load<T, V>(args.x, i) : zeros<T, V>();
    }
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int64_t i = first + k * THREADS;
      if (i < count) {
        float y[V];
        unpack(x[k], y);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          y[v] *= by;
        }
        store<T, V>(args.x, i, y);
      }
    }
  }
  if constexpr (V > 1) {
    const int64_t i = count * V + threadIdx.x;
    if (blockIdx.x == 0 && i < args.n) {
      float last[1];
      unpack(load<T, 1>(args.x, i), last);
      last[0] *= by;
      store<T, 1>(args.x, i, last);
    }
  }
}

// The rows of one launch from `first` on, of which `size` is the bytes of an element.
LossArgs from_row(LossArgs args, int64_t first, int64_t size) {
  args.rows = std::min(args.rows - first, AT_ONCE);
  args.logits.data += first * args.logits.stride;
  args.labels += first;
  args.losses += first;
  args.kept = args.kept == nullptr ? nullptr : args.kept + 2 * first;
  args.scale = args.scale == nullptr ? nullptr : args.scale + first;
  args.grad = args.grad == nullptr ? nullptr : static_cast<char*>(args.grad) + first * args.n * size;
  return args;
}

// Of long rows few at a time, so that the cache still has them when they are read again: of 128256 in bfloat16 1024 threads, one
// row to a multiprocessor, take 371 us where 512 take 427; of 32000, which are in the cache anyhow, 214 and 166.
template <typename T, int V>
cudaError_t run_losses(const LossArgs& args, const Device& device) {
  const int64_t most = args.grad != nullptr && args.n * static_cast<int64_t>(sizeof(T)) > (128 << 10) ? 1024 : 512;
  const dim3 block(std::min(most, (args.n / V + 127) / 128 * 32));
  const auto rows = args.grad != nullptr ? loss_rows<T, V, true> : loss_rows<T, V, false>;
  cudaError_t done = cudaSuccess;
  for (int64_t first = 0; done == cudaSuccess && first < args.rows; first += AT_ONCE) {
    const LossArgs part = from_row(args, first, sizeof(T));
    done = launch(rows, dim3(static_cast<unsigned>(part.rows)), block, 0, device, part);
  }
  return done;
}

template <typename T, int V>
cudaError_t run_gradients(const LossArgs& args, const Device& device) {
  const int64_t parts = (args.n / V + THREADS * EACH - 1) / (THREADS * EACH);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(args.rows * parts, 0x7fffffff)));
  return launch(gradient_parts<T, V>, grid, dim3(THREADS), 0, device, args);
}

template <typename T, int V>
cudaError_t run_scale(const ScaleArgs& args, const Device& device) {
  const int64_t parts = (args.n / V + THREADS * EACH - 1) / (THREADS * EACH);
  const dim3 grid(static_cast<unsigned>(std::clamp<int64_t>(parts, 1, 16 * device.multiprocessors)));
  return launch(scale_packs<T, V>, grid, dim3(THREADS), 0, device, args);
}

} // namespace

int losses(const LossArgs& args, Dtype dtype, bool wide, const Device& device) {
  return for_dtype(dtype, [&](auto of) {
    using T = decltype(of);
    return wide ? run_losses<T, WIDE<T>>(args, device) : run_losses<T, 1>(args, device);
  });
}

int gradients(const LossArgs& args, Dtype dtype, bool wide, const Device& device) {
  return for_dtype(dtype, [&](auto of) {
    using T = decltype(of);
    return wide ? run_gradients<T, WIDE<T>>(args, device) : run_gradients<T, 1>(args, device);
  });
}

int scale(const ScaleArgs& args, Dtype dtype, bool wide, const Device& device) {
  return for_dtype(dtype, [&](auto of) {
    using T = decltype(of);
    return wide ? run_scale<T, WIDE<T>>(args, device) : run_scale<T, 1>(args, device);
  });
}

} // namespace kernelhub

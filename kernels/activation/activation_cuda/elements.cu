#include "launch.h"
#include "rows.cuh"

namespace kernelhub {

namespace {

// tanh's argument in the approximation of GELU, doubled: x / 2 * (1 + tanh(u)) is x * sigmoid(2 * u), which does not
// cancel where tanh(u) is close to -1.
__device__ __forceinline__ float doubled_argument(float x) {
  return 1.5957691216057308f * fmaf(0.044715f * x * x, x, x);
}

// e**x and a / b: in 16 bits by what the GPU has instructions for, a tenth as long, whose error of 2**-21 or so decides how
// one of 4,000 values is rounded.
template <typename T>
__device__ __forceinline__ float exponential(float x) {
  return sizeof(T) == 4 ? expf(x) : __expf(x);
}
template <typename T>
__device__ __forceinline__ float over(float a, float b) {
  return sizeof(T) == 4 ? a / b : __fdividef(a, b);
}

// Rounded to T where models' own code rounds in between, which only that of the quick GELU does.
template <typename T, int FUNCTION>
__device__ __forceinline__ float value(float x) {
  if constexpr (FUNCTION == SILU) {
    return over<T>(x, 1.0f + exponential<T>(-x));
  } else if constexpr (FUNCTION == GELU) {
    return x * 0.5f * (1.0f + erff(x * 0.7071067811865476f));
  } else if constexpr (FUNCTION == GELU_TANH) {
    return over<T>(x, 1.0f + exponential<T>(-doubled_argument(x)));
  } else {
    return x * rounded<T>(over<T>(1.0f, 1.0f + exponential<T>(-rounded<T>(x * 1.702f))));
  }
}

// sigmoid(z) and its derivative, of e**-|z|, which does not overflow.
struct Logistic {
  float value, slope;
};
template <typename T>
__device__ __forceinline__ Logistic logistic(float z) {
  const float e = exponential<T>(-fabsf(z)), part = over<T>(1.0f, 1.0f + e);
  return {z < 0.0f ? e * part : part, e * part * part};
}

template <typename T, int FUNCTION>
__device__ __forceinline__ float slope(float x) {
  if constexpr (FUNCTION == SILU) {
    const Logistic of = logistic<T>(x);
    return fmaf(x, of.slope, of.value);
  } else if constexpr (FUNCTION == GELU) {
    const float below = 0.5f * (1.0f + erff(x * 0.7071067811865476f));
    return fmaf(x, 0.3989422804014327f * exponential<T>(-0.5f * x * x), below);
  } else if constexpr (FUNCTION == GELU_TANH) {
    const Logistic of = logistic<T>(doubled_argument(x));
    const float inner = 1.5957691216057308f * fmaf(0.134145f * x, x, 1.0f);
    return fmaf(x * of.slope, inner, of.value); // zero times what is finite for longer than x * inner
  } else {
    const float z = x * 1.702f;
    const Logistic of = logistic<T>(z);
    return fmaf(z, of.slope, of.value);
  }
}

template <typename T, int V, Op OP>
struct Loaded {
  Pack<T, V> grad, a, b;
};

template <typename T, int V, Op OP, int FUNCTION>
__device__ __forceinline__ void finish(
    const ElementArgs& args, int64_t at, int64_t dense, const Loaded<T, V, OP>& loaded) {
  float a[V], b[V], grad[V], y[V], other[V], again[V];
  unpack(loaded.a, a);
  if constexpr (OP == MULTIPLY || OP == MULTIPLY_BACKWARD) {
    unpack(loaded.b, b);
  }
  if constexpr (OP == APPLY_BACKWARD || OP == MULTIPLY_BACKWARD) {
    unpack(loaded.grad, grad);
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if constexpr (OP == APPLY) {
      y[v] = value<T, FUNCTION>(a[v]);
    } else if constexpr (OP == MULTIPLY) {
      y[v] = rounded<T>(value<T, FUNCTION>(a[v])) * b[v];
    } else if constexpr (OP == APPLY_BACKWARD) {
      y[v] = grad[v] * slope<T, FUNCTION>(a[v]);
    } else {
      y[v] = grad[v] * b[v] * slope<T, FUNCTION>(a[v]);
      const float f = rounded<T>(value<T, FUNCTION>(a[v]));
      other[v] = grad[v] * f;
      again[v] = f * b[v];
    }
  }
  if constexpr (OP == APPLY || OP == MULTIPLY) {
    store<T, V>(args.y, at, y);
  } else {
    store<T, V>(args.a_grad, at, y);
  }
  if constexpr (OP == MULTIPLY_BACKWARD) {
    store<T, V>(args.b_grad, at, other);
    if (args.y != nullptr) {
      store<T, V>(args.y, dense, again);
    }
  }
}

constexpr int THREADS = 256;

// EACH packs to a thread, THREADS apart, all loaded before the first is used.
template <typename T, int V, Op OP, int EACH>
__global__ void __launch_bounds__(THREADS) element_packs(const __grid_constant__ ElementArgs args) {
  wait_for_input();
  const int64_t columns = args.n / V, total = args.rows * columns, apart = args.to_stride / V;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (THREADS * EACH);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * (THREADS * EACH) + threadIdx.x; first < total; first += stride) {
    Loaded<T, V, OP> loaded[EACH];
    int64_t to[EACH];
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int64_t i = first + k * THREADS;
      if (i < total) {
        int64_t row = 0, column = i;
        if (args.rows > 1) {
          if ((total >> 32) == 0) {
            row = static_cast<uint32_t>(i) / static_cast<uint32_t>(columns);
          } else {
            row = i / columns;
          }
          column = i - row * columns;
        }
        to[k] = row * apart + column;
        loaded[k].a = load<T, V>(row_at(args.a, args.a_leading, row), column);
        if constexpr (OP == MULTIPLY || OP == MULTIPLY_BACKWARD) {
          loaded[k].b = load<T, V>(row_at(args.b, args.b_leading, row), column);
        }
        if constexpr (OP == APPLY_BACKWARD || OP == MULTIPLY_BACKWARD) {
          loaded[k].grad = load<T, V>(row_at(args.grad, args.grad_leading, row), column);
        }
      }
    }
    const auto rest = [&](auto function) {
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        if (first + k * THREADS < total) {
          finish<T, V, OP, decltype(function)::value>(args, to[k], first + k * THREADS, loaded[k]);
        }
      }
    };
    switch (args.function) {
      case SILU:
        rest(std::integral_constant<int, SILU>{});
        break;
      case GELU:
        rest(std::integral_constant<int, GELU>{});
        break;
      case GELU_TANH:
        rest(std::integral_constant<int, GELU_TANH>{});
        break;
      default:
        rest(std::integral_constant<int, GELU_QUICK>{});
    }
  }
}

template <typename T, int V, Op OP, int EACH>
cudaError_t start(const ElementArgs& args, const Device& device) {
  constexpr int64_t most = 0x7fffffff;
  const int64_t total = args.rows * (args.n / V), blocks = (total + THREADS * EACH - 1) / (THREADS * EACH);
  const dim3 grid(static_cast<unsigned>(blocks < most ? blocks : most));
  return launch(element_packs<T, V, OP, EACH>, grid, dim3(THREADS), 0, device, args);
}

template <typename T, Op OP>
cudaError_t run(const ElementArgs& args, bool wide, const Device& device) {
  if (args.rows * args.n <= THREADS * device.multiprocessors) { // an element to a thread: done soonest
    return start<T, 1, OP, 1>(args, device);
  }
  return wide ? start<T, WIDE<T>, OP, 2>(args, device) : start<T, 1, OP, 4>(args, device);
}

} // namespace

int elements(const ElementArgs& args, Op op, Dtype dtype, bool wide, const Device& device) {
  return for_dtype(dtype, [&](auto of) {
    using T = decltype(of);
    switch (op) {
      case APPLY:
        return run<T, APPLY>(args, wide, device);
      case APPLY_BACKWARD:
        return run<T, APPLY_BACKWARD>(args, wide, device);
      case MULTIPLY:
        return run<T, MULTIPLY>(args, wide, device);
      default:
        return run<T, MULTIPLY_BACKWARD>(args, wide, device);
    }
  });
}

} // namespace kernelhub

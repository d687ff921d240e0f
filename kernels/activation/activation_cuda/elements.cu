#include "launch.h"
#include "rows.cuh"

namespace kernelhub {

namespace {

// tanh's argument in the approximation of GELU, doubled: x / 2 * (1 + tanh(u)) is x * sigmoid(2 * u), which does not
// cancel where tanh(u) is close to -1.
__device__ __forceinline__ float doubled_argument(float x) {
  return 1.5957691216057308f * fmaf(0.044715f * x * x, x, x);
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

// Where results lie; null where they are not wanted.
struct Results {
  void *y, *a_grad, *b_grad;
};

// Writes the results of one pack: as pack `at`, and, where f(a) * b is one beside gradients, that one as pack `dense`.
template <typename T, int V, Op OP, int FUNCTION>
__device__ __forceinline__ void finish(
    const Results& to, int64_t at, int64_t dense, const Loaded<T, V, OP>& loaded) {
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
    store<T, V>(to.y, at, y);
  } else {
    store<T, V>(to.a_grad, at, y);
  }
  if constexpr (OP == MULTIPLY_BACKWARD) {
    store<T, V>(to.b_grad, at, other);
    if (to.y != nullptr) {
      store<T, V>(to.y, dense, again);
    }
  }
}

template <typename T, int V, Op OP>
__device__ __forceinline__ Loaded<T, V, OP> load_all(const char* grad, const char* a, const char* b, int64_t column) {
  Loaded<T, V, OP> loaded;
  loaded.a = load<T, V>(a, column);
  if constexpr (OP == MULTIPLY || OP == MULTIPLY_BACKWARD) {
    loaded.b = load<T, V>(b, column);
  }
  if constexpr (OP == APPLY_BACKWARD || OP == MULTIPLY_BACKWARD) {
    loaded.grad = load<T, V>(grad, column);
  }
  return loaded;
}

constexpr int THREADS = 256;

// EACH packs to a thread, THREADS apart, all loaded before the first is used; of rows of any length, and of any number.
template <typename T, int V, Op OP, int EACH>
__global__ void __launch_bounds__(THREADS) element_packs(const __grid_constant__ ElementArgs args) {
  wait_for_input();
  const Results results{args.y, args.a_grad, args.b_grad};
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
        loaded[k] = load_all<T, V, OP>(
            row_at(args.grad, args.grad_leading, row), row_at(args.a, args.a_leading, row), row_at(args.b, args.b_leading, row),
            column);
      }
    }
    const auto rest = [&](auto function) {
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        if (first + k * THREADS < total) {
          finish<T, V, OP, decltype(function)::value>(results, to[k], first + k * THREADS, loaded[k]);
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

// Rows that lie at one distance from each other, by blocks that have each its part of one, a pack or an element to a thread.
// There is little to compute and little to wait for but memory, for which all threads that fit ask at once.
struct InRows {
  const char *a, *b, *grad;
  Results to;
  int64_t a_stride, b_stride, grad_stride; // bytes
  int64_t to_stride;                       // packs
  unsigned columns;                        // packs
  unsigned across;                         // blocks to a row; 0 where there is one row
};
// Threads of a block at most, and blocks to a multiprocessor: all that it can have, or, where three results are computed, so many
// that each has 40 registers. With an element to a thread there is about one block to a multiprocessor.
template <int V, Op OP>
constexpr int MOST = V == 1 ? THREADS : OP != MULTIPLY ? 128 : RESIDENT % 1024 == 0 ? 1024 : 512;
template <int V, Op OP>
constexpr int BLOCKS = V == 1    ? 1
    : OP == MULTIPLY_BACKWARD ? std::min(12, RESIDENT / MOST<V, OP>)
                              : RESIDENT / MOST<V, OP>;

template <typename T, int V, Op OP, int FUNCTION>
__global__ void __launch_bounds__(MOST<V, OP>, BLOCKS<V, OP>) element_rows(const __grid_constant__ InRows of) {
  wait_for_input();
  const unsigned row = of.across == 0 ? 0 : blockIdx.x / of.across;
  const unsigned column = (blockIdx.x - row * of.across) * blockDim.x + threadIdx.x;
  if (column < of.columns) {
    const Loaded<T, V, OP> loaded =
        load_all<T, V, OP>(of.grad + row * of.grad_stride, of.a + row * of.a_stride, of.b + row * of.b_stride, column);
    finish<T, V, OP, FUNCTION>(of.to, row * of.to_stride + column, static_cast<int64_t>(row) * of.columns + column, loaded);
  }
}

template <typename T, int V, Op OP, int EACH>
cudaError_t start(const ElementArgs& args, const Device& device) {
  constexpr int64_t most = 0x7fffffff;
  const int64_t total = args.rows * (args.n / V), blocks = (total + THREADS * EACH - 1) / (THREADS * EACH);
  const dim3 grid(static_cast<unsigned>(blocks < most ? blocks : most));
  return launch(element_packs<T, V, OP, EACH>, grid, dim3(THREADS), 0, device, args);
}

// How blocks of up to so many threads cover a row, evenly.
struct Rows {
  int64_t columns, across;
  int threads;

  // Too few threads fit on a multiprocessor, or many have nothing to do.
  bool idle() const { return threads < 64 || 8 * columns < 7 * across * threads; }
};
Rows rows_of(int64_t columns, int most) {
  const int64_t across = (columns + most - 1) / most;
  return {columns, across, round_up(static_cast<int>((columns + across - 1) / across), 32)};
}

template <typename T, int V, Op OP>
cudaError_t start_rows(const ElementArgs& args, const Rows& rows, const Device& device) {
  const InRows of{
      args.a.data, args.b.data, args.grad.data, {args.y, args.a_grad, args.b_grad}, args.a.stride, args.b.stride,
      args.grad.stride, args.to_stride / V, static_cast<unsigned>(rows.columns),
      args.rows == 1 ? 0 : static_cast<unsigned>(rows.across)};
  const dim3 grid(static_cast<unsigned>(args.rows * rows.across)), block(static_cast<unsigned>(rows.threads));
  switch (args.function) {
    case SILU:
      return launch(element_rows<T, V, OP, SILU>, grid, block, 0, device, of);
    case GELU:
      return launch(element_rows<T, V, OP, GELU>, grid, block, 0, device, of);
    case GELU_TANH:
      return launch(element_rows<T, V, OP, GELU_TANH>, grid, block, 0, device, of);
    default:
      return launch(element_rows<T, V, OP, GELU_QUICK>, grid, block, 0, device, of);
  }
}

template <typename T, Op OP>
cudaError_t run(const ElementArgs& args, bool wide, const Device& device) {
  constexpr int V = WIDE<T>;
  const bool plain = args.a.others == 0 && args.b.others == 0 && args.grad.others == 0;
  if (args.rows * args.n <= THREADS * device.multiprocessors) { // an element to a thread: done soonest
    const Rows rows = rows_of(args.n, MOST<1, OP>);
    return plain && (args.rows == 1 || !rows.idle()) ? start_rows<T, 1, OP>(args, rows, device)
                                                     : start<T, 1, OP, 1>(args, device);
  }
  if (!wide) {
    return start<T, 1, OP, 4>(args, device);
  }
  const int64_t columns = args.n / V;
  // What reads from two places and writes to one is faster by large blocks, if there is little to compute, they fill a
  // multiprocessor, and there are many of them.
  const bool large = OP == MULTIPLY && args.rows == 1 && args.function != GELU && device.threads % MOST<V, OP> == 0 &&
      columns >= 8 * static_cast<int64_t>(device.multiprocessors) * device.threads;
  const Rows rows = rows_of(columns, large ? MOST<V, OP> : 128);
  if (!plain || rows.idle() || columns > 0x7fffffff || args.rows > 0x7fffffff / rows.across) {
    return start<T, V, OP, 2>(args, device);
  }
  return start_rows<T, V, OP>(args, rows, device);
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

#include "launch.h"
#include "rows.cuh"

namespace kernelhub {

namespace {

// V elements of C from the i-th on, in float32; i is a multiple of V.
template <typename C, int V>
__device__ __forceinline__ void read(const char* from, int i, float (&to)[V]) {
  constexpr int W = V == 1 ? 1 : WIDE<C>;
  if constexpr (W == V) {
    unpack(load<C, V>(from, i / V), to);
  } else {
#pragma unroll
    for (int part = 0; part < V / W; ++part) {
      float some[W];
      unpack(load<C, W>(from, i / W + part), some);
#pragma unroll
      for (int w = 0; w < W; ++w) {
        to[part * W + w] = some[w];
      }
    }
  }
}

// The first and the second elements of V pairs from the i-th on; of a table that has one element for a pair, that one twice.
template <typename C, int V>
__device__ __forceinline__ void read_pairs(
    const char* from, int i, int half, bool interleaved, bool paired, float (&first)[V], float (&second)[V]) {
  if (paired || !interleaved) {
    read<C, V>(from, i, first);
    read<C, V>(from, paired ? i : half + i, second);
    return;
  }
  float low[V], high[V];
  read<C, V>(from, 2 * i, low);
  read<C, V>(from, 2 * i + V, high);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    first[v] = 2 * v < V ? low[2 * v % V] : high[2 * v % V];
    second[v] = 2 * v + 1 < V ? low[(2 * v + 1) % V] : high[(2 * v + 1) % V];
  }
}

template <typename T, int V>
__device__ __forceinline__ void write_pairs(
    char* to, int i, int half, bool interleaved, const float (&first)[V], const float (&second)[V]) {
  if (!interleaved) {
    store<T, V>(to, i / V, first);
    store<T, V>(to, (half + i) / V, second);
    return;
  }
  float low[V], high[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    low[v] = v % 2 == 0 ? first[v / 2] : second[v / 2];
    high[v] = (V + v) % 2 == 0 ? first[(V + v) / 2] : second[(V + v) / 2];
  }
  store<T, V>(to, 2 * i / V, low);
  store<T, V>(to, 2 * i / V + 1, high);
}

// x * cos + other * sin, rounded where PyTorch's three operations round.
template <typename T>
__device__ __forceinline__ float turned(float x, float cos, float other, float sin, bool rounds) {
  const float a = __fmul_rn(x, cos), b = __fmul_rn(other, sin);
  return rounds ? rounded<T>(a) + rounded<T>(b) : a + b;
}

// A block turns the heads of a token: threadIdx.x counts packs of pairs, whose cos and sin it reads once, threadIdx.y heads.
template <typename T, typename C, int V>
__global__ void __launch_bounds__(512) rotate_tokens(const __grid_constant__ RotateArgs args) {
  wait_for_input();
  const int half = args.rotary / 2, i = threadIdx.x * V, heads = args.heads[0] + args.heads[1];
  const bool interleaved = args.form & INTERLEAVED, rounds = !(args.form & ROUND_ONCE);
  const bool transposed = args.form & TRANSPOSED, inverse = args.form & INVERSE;
  const float minus = inverse != transposed ? 1.0f : -1.0f;
  for (int64_t at = blockIdx.x; at < args.batches * args.tokens; at += gridDim.x) {
    const int64_t batch = at / args.tokens, token = at - batch * args.tokens;
    float cos_first[V], cos_second[V], sin_first[V], sin_second[V];
    if (i < half) {
      const char* cos = args.cos.data + batch * args.cos.batch + token * args.cos.token;
      const char* sin = args.sin.data + batch * args.sin.batch + token * args.sin.token;
      read_pairs<C, V>(cos, i, half, interleaved, args.paired, cos_first, cos_second);
      // The first of a pair takes -sin of its own place, transposed sin of the other one's.
      if (transposed) {
        read_pairs<C, V>(sin, i, half, interleaved, args.paired, sin_second, sin_first);
      } else {
        read_pairs<C, V>(sin, i, half, interleaved, args.paired, sin_first, sin_second);
      }
    }
#pragma unroll 2
    for (int head = blockIdx.y * blockDim.y + threadIdx.y; head < heads; head += gridDim.y * blockDim.y) {
      const int which = head < args.heads[0] ? 0 : 1, of = head - (which == 0 ? 0 : args.heads[0]);
      const Steps &from = args.x[which], &to = args.y[which];
      const char* x = from.data + batch * from.batch + token * from.token + of * from.head;
      char* y = to.data + batch * to.batch + token * to.token + of * to.head;
      if (i < half) {
        float a[V], b[V], first[V], second[V];
        read_pairs<T, V>(x, i, half, interleaved, false, a, b);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          first[v] = turned<T>(a[v], cos_first[v], b[v], minus * sin_first[v], rounds);
          second[v] = turned<T>(b[v], cos_second[v], a[v], -minus * sin_second[v], rounds);
        }
        write_pairs<T, V>(y, i, half, interleaved, first, second);
      }
      for (int rest = args.rotary / V + threadIdx.x; rest < args.width[which] / V; rest += blockDim.x) {
        store<T, V>(y, rest, load<T, V>(x, rest));
      }
    }
  }
}

template <typename T, typename C, int V>
cudaError_t start(const RotateArgs& args, const Device& device) {
  const int pairs = std::max(1, (args.rotary / 2 + V - 1) / V), heads = args.heads[0] + args.heads[1];
  const int64_t tokens = args.batches * args.tokens;
  // Two heads to a thread where there are many tokens, else as many blocks as heads allow.
  const int together = std::max(1, std::min({256 / pairs, (heads + 1) / 2}));
  const unsigned parts = tokens < device.multiprocessors ? static_cast<unsigned>((heads + together - 1) / together) : 1;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(tokens, 0x7fffffff)), parts);
  return launch(rotate_tokens<T, C, V>, grid, dim3(pairs, together), 0, device, args);
}

template <typename T, typename C>
cudaError_t run(const RotateArgs& args, bool wide, const Device& device) {
  return wide ? start<T, C, WIDE<T>>(args, device) : start<T, C, 1>(args, device);
}

} // namespace

int rotate(const RotateArgs& args, Dtype dtype, bool wide_table, bool wide, const Device& device) {
  return for_dtype(dtype, [&](auto of) {
    using T = decltype(of);
    return wide_table ? run<T, float>(args, wide, device) : run<T, T>(args, wide, device);
  });
}

} // namespace kernelhub

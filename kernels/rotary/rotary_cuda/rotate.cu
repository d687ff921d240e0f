#include "launch.h"
#include "rows.cuh"

namespace kernelhub {

namespace {

// V pairs of elements as they lie in memory: the first ones of all and the second ones, or pair by pair.
template <typename C, int V>
struct Pairs {
  static constexpr int W = V == 1 ? 1 : WIDE<C>;
  Pack<C, W> low[V / W], high[V / W];
};

// Those from the i-th on, a multiple of V; of a table that has one element for a pair, that one twice.
template <typename C, int V>
__device__ __forceinline__ Pairs<C, V> load_pairs(const char* from, int i, int half, bool interleaved, bool paired) {
  constexpr int W = Pairs<C, V>::W;
  const bool together = interleaved && !paired;
  const int low = together ? 2 * i : i, high = together ? 2 * i + V : paired ? i : half + i;
  Pairs<C, V> to;
#pragma unroll
  for (int part = 0; part < V / W; ++part) {
    to.low[part] = load<C, W>(from, low / W + part);
    to.high[part] = load<C, W>(from, high / W + part);
  }
  return to;
}

// In float32; `together` where they lie pair by pair.
template <typename C, int V>
__device__ __forceinline__ void unpack_pairs(
    const Pairs<C, V>& from, bool together, float (&first)[V], float (&second)[V]) {
  constexpr int W = Pairs<C, V>::W;
  float low[V], high[V];
#pragma unroll
  for (int part = 0; part < V / W; ++part) {
    float some[W], more[W];
    unpack(from.low[part], some);
    unpack(from.high[part], more);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      low[part * W + w] = some[w];
      high[part * W + w] = more[w];
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    first[v] = !together ? low[v] : 2 * v < V ? low[2 * v % V] : high[2 * v % V];
    second[v] = !together ? high[v] : 2 * v + 1 < V ? low[(2 * v + 1) % V] : high[(2 * v + 1) % V];
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

// The same for two elements at a time, in 16 bits: every operation rounds once, as PyTorch's do.
template <typename T>
__device__ __forceinline__ uint32_t turned_two(uint32_t x, uint32_t cos, uint32_t other, uint32_t sin) {
  using Two = std::conditional_t<std::is_same_v<T, BFloat16>, __nv_bfloat162, __half2>;
  const auto two = [](const uint32_t& bits) { return *reinterpret_cast<const Two*>(&bits); };
  const Two sum = __hadd2_rn(__hmul2_rn(two(x), two(cos)), __hmul2_rn(two(other), two(sin)));
  return *reinterpret_cast<const uint32_t*>(&sum);
}

// A block turns the heads of a token: threadIdx.x counts packs of pairs, whose cos and sin it reads once, threadIdx.y heads,
// of which a thread has EACH loaded before it turns the first.
template <typename T, typename C, int V, int EACH>
__global__ void __launch_bounds__(512) rotate_tokens(const __grid_constant__ RotateArgs args) {
  wait_for_input();
  const int half = args.rotary / 2, i = threadIdx.x * V, of_q = args.heads[0], heads = of_q + args.heads[1];
  const bool interleaved = args.form & INTERLEAVED, rounds = !(args.form & ROUND_ONCE);
  const bool transposed = args.form & TRANSPOSED, inverse = args.form & INVERSE, together = interleaved && !args.paired;
  const float minus = inverse != transposed ? 1.0f : -1.0f;
  const int stride = gridDim.y * blockDim.y;
  constexpr bool TWO = V != 1 && sizeof(T) == 2 && std::is_same_v<T, C>;
  const bool by_two = TWO && rounds && !interleaved;
  for (int64_t at = blockIdx.x; at < args.batches * args.tokens; at += gridDim.x) {
    const int64_t batch = args.batches == 1             ? 0
        : ((args.batches * args.tokens) >> 32) == 0 ? static_cast<uint32_t>(at) / static_cast<uint32_t>(args.tokens)
                                                    : at / args.tokens;
    const int64_t token = at - batch * args.tokens;
    const char* const q = args.x[0].data + batch * args.x[0].batch + token * args.x[0].token;
    const char* const k = args.x[1].data + batch * args.x[1].batch + token * args.x[1].token;
    char* const q_to = args.y[0].data + batch * args.y[0].batch + token * args.y[0].token;
    char* const k_to = args.y[1].data + batch * args.y[1].batch + token * args.y[1].token;
    const auto from = [&](int head) {
      return head < of_q ? q + head * args.x[0].head : k + (head - of_q) * args.x[1].head;
    };
    const auto to = [&](int head) {
      return head < of_q ? q_to + head * args.y[0].head : k_to + (head - of_q) * args.y[1].head;
    };
    Pairs<C, V> cos, sin;
    if (i < half) {
      cos = load_pairs<C, V>(args.cos.data + batch * args.cos.batch + token * args.cos.token, i, half, interleaved, args.paired);
      sin = load_pairs<C, V>(args.sin.data + batch * args.sin.batch + token * args.sin.token, i, half, interleaved, args.paired);
    }
    Pack<T, V> signed_first, signed_second; // sin as a pair's first and second elements take it
    if constexpr (TWO) {
      signed_first = transposed ? sin.high[0] : sin.low[0];
      signed_second = transposed ? sin.low[0] : sin.high[0];
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        signed_first.words[word] ^= minus < 0.0f ? 0x80008000u : 0u;
        signed_second.words[word] ^= minus < 0.0f ? 0u : 0x80008000u;
      }
    }
    for (int begin = blockIdx.y * blockDim.y + threadIdx.y; begin < heads; begin += EACH * stride) {
      Pairs<T, V> x[EACH];
#pragma unroll
      for (int each = 0; each < EACH; ++each) {
        const int head = begin + each * stride;
        if (head < heads && i < half) {
          x[each] = load_pairs<T, V>(from(head), i, half, interleaved, false);
        }
      }
#pragma unroll
      for (int each = 0; each < EACH; ++each) {
        const int head = begin + each * stride;
        if (head >= heads) {
          break;
        }
        if constexpr (TWO) {
          if (by_two && i < half) {
            Pack<T, V> first, second;
#pragma unroll
            for (int word = 0; word < 4; ++word) {
              const uint32_t a = x[each].low[0].words[word], b = x[each].high[0].words[word];
              first.words[word] = turned_two<T>(a, cos.low[0].words[word], b, signed_first.words[word]);
              second.words[word] = turned_two<T>(b, cos.high[0].words[word], a, signed_second.words[word]);
            }
            store<T, V>(to(head), i / V, first);
            store<T, V>(to(head), (half + i) / V, second);
          }
        }
        if (!by_two && i < half) {
          float a[V], b[V], cos_first[V], cos_second[V], sin_first[V], sin_second[V], first[V], second[V];
          unpack_pairs(x[each], interleaved, a, b);
          unpack_pairs(cos, together, cos_first, cos_second);
          unpack_pairs(sin, together, sin_first, sin_second);
#pragma unroll
          for (int v = 0; v < V; ++v) { // the first of a pair takes -sin of its own place, transposed sin of the other one's
            first[v] = turned<T>(a[v], cos_first[v], b[v], minus * (transposed ? sin_second[v] : sin_first[v]), rounds);
            second[v] = turned<T>(b[v], cos_second[v], a[v], -minus * (transposed ? sin_first[v] : sin_second[v]), rounds);
          }
          write_pairs<T, V>(to(head), i, half, interleaved, first, second);
        }
        const int width = head < of_q ? args.width[0] : args.width[1];
        for (int rest = args.rotary / V + threadIdx.x; rest < width / V; rest += blockDim.x) {
          store<T, V>(to(head), rest, load<T, V>(from(head), rest));
        }
      }
    }
  }
}

// Where cos and sin are of T and what is turned is whole heads of a power of 2 of packs, in halves, rounded as PyTorch does:
// a pack to a lane, a head's to its neighbours, which exchange halves, so that a warp reads and writes 512 bytes in a row and
// holds a pack of cos and of sin. threadIdx.y counts a token's warps, threadIdx.z tokens; EACH packs are loaded before the
// first is turned. On H200 that takes 96 % of `rotate_tokens`' time; with one pack to a thread 118 %, and 120 % where there is
// one token.
template <typename T, int EACH>
__global__ void __launch_bounds__(256) rotate_heads(const __grid_constant__ RotateArgs args) {
  constexpr int V = WIDE<T>;
  wait_for_input();
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  if (at >= args.batches * args.tokens) { // whole warps
    return;
  }
  const int packs = args.rotary / V, half = packs / 2, i = threadIdx.x & (packs - 1), together = 32 / packs;
  const int of_q = args.heads[0], heads = of_q + args.heads[1];
  const bool transposed = args.form & TRANSPOSED, inverse = args.form & INVERSE;
  const int64_t batch = args.batches == 1             ? 0
      : ((args.batches * args.tokens) >> 32) == 0 ? static_cast<uint32_t>(at) / static_cast<uint32_t>(args.tokens)
                                                  : at / args.tokens;
  const int64_t token = at - batch * args.tokens;
  const char* const q = args.x[0].data + batch * args.x[0].batch + token * args.x[0].token;
  const char* const k = args.x[1].data + batch * args.x[1].batch + token * args.x[1].token - of_q * args.x[1].head;
  char* const q_to = args.y[0].data + batch * args.y[0].batch + token * args.y[0].token;
  char* const k_to = args.y[1].data + batch * args.y[1].batch + token * args.y[1].token - of_q * args.y[1].head;
  const int first = threadIdx.y * together + threadIdx.x / packs, stride = blockDim.y * together;
  Pack<T, V> cos, sin;
  for (int begin = 0; begin < heads; begin += EACH * stride) {
    Pack<T, V> x[EACH];
#pragma unroll
    for (int each = 0; each < EACH; ++each) {
      const int head = begin + first + each * stride;
      const bool is_q = head < of_q;
      x[each] = head < heads ? load<T, V>((is_q ? q : k) + head * (is_q ? args.x[0].head : args.x[1].head), i) : zeros<T, V>();
    }
    if (begin == 0) { // sin as this half takes it: of its own place, transposed of the other one's; one of the two is negative
      const int here = args.paired ? i & (half - 1) : i;
      const uint32_t sign = (inverse != transposed) == (i < half) ? 0u : 0x80008000u;
      cos = load<T, V>(args.cos.data + batch * args.cos.batch + token * args.cos.token, here);
      sin = load<T, V>(
          args.sin.data + batch * args.sin.batch + token * args.sin.token, transposed && !args.paired ? i ^ half : here);
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        sin.words[word] ^= sign;
      }
    }
#pragma unroll
    for (int each = 0; each < EACH; ++each) {
      const int head = begin + first + each * stride;
      const bool is_q = head < of_q;
      Pack<T, V> y;
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const uint32_t other = __shfl_xor_sync(0xffffffffu, x[each].words[word], half);
        y.words[word] = turned_two<T>(x[each].words[word], cos.words[word], other, sin.words[word]);
      }
      if (head < heads) {
        store<T, V>((is_q ? q_to : k_to) + head * (is_q ? args.y[0].head : args.y[1].head), i, y);
      }
    }
  }
}

template <typename T, int EACH>
cudaError_t start_heads(const RotateArgs& args, int steps, const Device& device) {
  const int warps = std::min((steps + EACH - 1) / EACH, 8), together = 8 / warps;
  const int64_t blocks = (args.batches * args.tokens + together - 1) / together;
  return launch(rotate_heads<T, EACH>, dim3(static_cast<unsigned>(blocks)), dim3(32, warps, together), 0, device, args);
}

template <typename T, typename C, int V, int EACH>
cudaError_t start(const RotateArgs& args, const Device& device) {
  const int pairs = std::max(1, (args.rotary / 2 + V - 1) / V), heads = args.heads[0] + args.heads[1];
  const int64_t tokens = args.batches * args.tokens;
  if constexpr (V != 1 && sizeof(T) == 2 && std::is_same_v<T, C>) {
    const int packs = args.rotary / V;
    const bool powers = packs >= 2 && packs <= 32 && (packs & (packs - 1)) == 0;
    const bool whole = args.width[0] == args.rotary && args.width[1] == args.rotary;
    if (powers && whole && !(args.form & (INTERLEAVED | ROUND_ONCE)) && tokens <= 0x7fffffff) {
      const int steps = (heads * packs + 31) / 32;
      return (steps + 4) / 5 * 5 <= (steps + 3) / 4 * 4 ? start_heads<T, 5>(args, steps, device)
                                                        : start_heads<T, 4>(args, steps, device);
    }
  }
  // A warp to a token where there are many tokens (on H200 94 us, 117 with ten times the threads), else a head to a thread.
  const bool many = tokens >= device.multiprocessors;
  const int together = std::max(1, std::min((many ? 32 : 256) / pairs, heads));
  const unsigned parts = many ? 1 : static_cast<unsigned>(std::min((heads + together - 1) / together, 65535));
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(tokens, 0x7fffffff)), parts);
  return launch(rotate_tokens<T, C, V, EACH>, grid, dim3(pairs, together), 0, device, args);
}

template <typename T, typename C>
cudaError_t run(const RotateArgs& args, bool wide, const Device& device) {
  return wide ? start<T, C, WIDE<T>, 4>(args, device) : start<T, C, 1, 4>(args, device);
}

} // namespace

int rotate(const RotateArgs& args, Dtype dtype, bool wide_table, bool wide, const Device& device) {
  return for_dtype(dtype, [&](auto of) {
    using T = decltype(of);
    return wide_table ? run<T, float>(args, wide, device) : run<T, T>(args, wide, device);
  });
}

} // namespace kernelhub

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

// A block turns the heads of a token: threadIdx.x counts packs of pairs, whose cos and sin it reads once, threadIdx.y heads,
// of which a thread has EACH loaded before it turns the first.
constexpr int EACH = 4;

template <typename T, typename C, int V>
__global__ void __launch_bounds__(512) rotate_tokens(const __grid_constant__ RotateArgs args) {
  wait_for_input();
  const int half = args.rotary / 2, i = threadIdx.x * V, of_q = args.heads[0], heads = of_q + args.heads[1];
  const bool interleaved = args.form & INTERLEAVED, rounds = !(args.form & ROUND_ONCE);
  const bool transposed = args.form & TRANSPOSED, inverse = args.form & INVERSE, together = interleaved && !args.paired;
  const float minus = inverse != transposed ? 1.0f : -1.0f;
  const int stride = gridDim.y * blockDim.y;
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
        if (i < half) {
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

// The same of a word: in 16 bits two elements, of which every operation rounds once, as PyTorch's do.
template <typename T>
__device__ __forceinline__ uint32_t turned_word(uint32_t x, uint32_t cos, uint32_t other, uint32_t sin) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(turned<T>(
        __uint_as_float(x), __uint_as_float(cos), __uint_as_float(other), __uint_as_float(sin), false));
  } else {
    using Two = std::conditional_t<std::is_same_v<T, BFloat16>, __nv_bfloat162, __half2>;
    const auto two = [](const uint32_t& bits) { return *reinterpret_cast<const Two*>(&bits); };
    const Two sum = __hadd2_rn(__hmul2_rn(two(x), two(cos)), __hmul2_rn(two(other), two(sin)));
    return *reinterpret_cast<const uint32_t*>(&sum);
  }
}

constexpr int IN_ORDER = 128; // threads to a block

// Divides numbers below 2**31 by one from 2 on; there is no instruction for that.
struct Divisor {
  uint32_t magic;
  int shift;
};

Divisor divisor(int64_t by) {
  int bits = 1;
  while ((int64_t{1} << bits) < by) {
    ++bits;
  }
  return {static_cast<uint32_t>(((int64_t{1} << (31 + bits)) + by - 1) / by), bits - 1};
}

__device__ __forceinline__ uint32_t divided(uint32_t number, const Divisor& by) {
  return __umulhi(number, by.magic) >> by.shift;
}

// q or k, of each batch, as it lies in memory: packs of a head, heads of a token and tokens, or tokens of a head and heads.
struct InOrder {
  const char* from;
  char* to;
  uint32_t packs; // of all heads and tokens
  Divisor row;    // by the packs of all that is inside
};

// Where it lies, if there are gaps, or tokens inside heads.
struct Apart {
  int64_t from_batch, from_outer, from_inner, to_batch, to_outer, to_inner; // strides in bytes
  uint32_t inner; // heads of a token, or tokens of a head
  bool by_heads;
};

struct InOrderArgs {
  unsigned blocks; // of q; those of k come after them
  int width, turned; // packs of a head, and those of them that are turned
  Divisor head;      // by `width`
  InOrder of[2];
  const char *cos, *sin;
  uint32_t cos_batch, cos_token, sin_batch, sin_token; // strides in packs
  uint32_t low_sign, high_sign;                        // of sin, as the first half takes it and the second
  bool paired, crossed; // one element for each pair; sin is that of the other half's place
  Apart apart[2];
};

// A pack to a thread, in the order in which q and then k lie in memory. Where cos and sin are of T, halves are turned, and
// what PyTorch rounds is rounded. A thread reads its pair's other pack too, which the first cache has. With one pack to a
// thread all that comes before it is read counts: it is asked for before anything else is worked out, all before any is
// waited for, and of the arguments, which lie in the order of their use, little is read.
template <typename T, bool DENSE>
__global__ void __launch_bounds__(IN_ORDER, RESIDENT / IN_ORDER) rotate_in_order(const __grid_constant__ InOrderArgs args) {
  constexpr int V = WIDE<T>;
  wait_for_input();
  const bool of_k = blockIdx.x >= args.blocks;
  const InOrder& of = args.of[of_k];
  const uint32_t at = (blockIdx.x - (of_k ? args.blocks : 0)) * IN_ORDER + threadIdx.x, batch = blockIdx.y;
  if (at >= of.packs) {
    return;
  }
  const uint32_t head = divided(at, args.head), outer = divided(at, of.row);
  const int i = static_cast<int>(at - head * args.width), half = args.turned / 2;
  const char* from = of.from;
  char* to = of.to;
  uint32_t token = outer;
  if constexpr (DENSE) {
    const int64_t bytes = (static_cast<int64_t>(batch) * of.packs + at) * 16;
    from += bytes, to += bytes;
  } else {
    const Apart& apart = args.apart[of_k];
    const uint32_t inner = head - outer * apart.inner;
    from += batch * apart.from_batch + outer * apart.from_outer + inner * apart.from_inner + i * 16;
    to += batch * apart.to_batch + outer * apart.to_outer + inner * apart.to_inner + i * 16;
    token = apart.by_heads ? inner : outer;
  }
  const Pack<T, V> x = load<T, V>(from, 0);
  const bool turns = i < args.turned, low = i < half; // what is not turned reads on, itself and the first of cos and sin
  const int across = !turns ? 0 : low ? half : -half, here = !turns ? 0 : args.paired && !low ? i - half : i;
  const Pack<T, V> other = load<T, V>(from, across);
  const Pack<T, V> cos = load_hinted<T, V, false>(args.cos, batch * args.cos_batch + token * args.cos_token + here);
  const Pack<T, V> sin = load_hinted<T, V, false>(
      args.sin, batch * args.sin_batch + token * args.sin_token + (args.crossed ? here + across : here));
  const uint32_t sign = low ? args.low_sign : args.high_sign;
  Pack<T, V> y;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const uint32_t of_word = turned_word<T>(x.words[word], cos.words[word], other.words[word], sin.words[word] ^ sign);
    y.words[word] = turns ? of_word : x.words[word];
  }
  store<T, V>(to, 0, y);
}

// Whether there are no gaps; strides of what there is but one of may be any.
template <int N>
bool is_dense(const int64_t (&strides)[N], const int64_t (&sizes)[N]) {
  int64_t bytes = 16;
  for (int dim = N - 1; dim >= 0; --dim) {
    if (sizes[dim] != 1 && strides[dim] != bytes) {
      return false;
    }
    bytes *= sizes[dim];
  }
  return true;
}

// Whether the kernel takes this: a grid counts a batch's packs and the batches, and heads of q and of k are of one width.
template <typename T>
bool in_order(const RotateArgs& args, InOrderArgs& in, bool& dense) {
  constexpr int64_t most = 0x7fffffff;
  if (args.batches > 65535 || args.width[0] != args.width[1]) {
    return false;
  }
  const int64_t width = args.width[0] / WIDE<T>;
  dense = true;
  for (int which = 0; which < 2; ++which) {
    const Steps &x = args.x[which], &y = args.y[which];
    const int64_t heads = args.heads[which], packs = width * heads * args.tokens;
    if (packs > most) {
      return false;
    }
    const bool by_heads = args.tokens > 1 && x.head > x.token; // the stride of one token is 0
    const int64_t inner = by_heads ? args.tokens : heads;
    const int64_t sizes[] = {args.batches, by_heads ? heads : args.tokens, inner, width};
    const int64_t from[] = {x.batch, by_heads ? x.head : x.token, by_heads ? x.token : x.head, 16};
    const int64_t to[] = {y.batch, by_heads ? y.head : y.token, by_heads ? y.token : y.head, 16};
    dense = dense && !by_heads && is_dense(from, sizes) && is_dense(to, sizes);
    in.of[which] = {x.data, y.data, static_cast<uint32_t>(packs), divisor(std::max<int64_t>(width * inner, 2))};
    in.apart[which] = {from[0], from[1], from[2], to[0], to[1], to[2], static_cast<uint32_t>(inner), by_heads};
  }
  for (const Steps& table : {args.cos, args.sin}) {
    if (((args.batches - 1) * table.batch + (args.tokens - 1) * table.token) / 16 + args.rotary > most) {
      return false;
    }
  }
  in.blocks = (in.of[0].packs + IN_ORDER - 1) / IN_ORDER;
  in.width = static_cast<int>(width), in.turned = args.rotary / WIDE<T>;
  in.head = divisor(width);
  in.cos = args.cos.data, in.sin = args.sin.data;
  in.cos_batch = static_cast<uint32_t>(args.cos.batch / 16), in.cos_token = static_cast<uint32_t>(args.cos.token / 16);
  in.sin_batch = static_cast<uint32_t>(args.sin.batch / 16), in.sin_token = static_cast<uint32_t>(args.sin.token / 16);
  const bool transposed = args.form & TRANSPOSED, inverse = args.form & INVERSE;
  const uint32_t minus = sizeof(T) == 4 ? 0x80000000u : 0x80008000u; // one of a pair takes -sin
  in.low_sign = inverse == transposed ? minus : 0u, in.high_sign = inverse == transposed ? 0u : minus;
  in.paired = args.paired, in.crossed = transposed && !args.paired;
  return true;
}

template <typename T, typename C, int V>
cudaError_t start(const RotateArgs& args, const Device& device) {
  const int pairs = std::max(1, (args.rotary / 2 + V - 1) / V), heads = args.heads[0] + args.heads[1];
  const int64_t tokens = args.batches * args.tokens;
  if constexpr (V != 1 && std::is_same_v<T, C>) {
    const bool rounds = sizeof(T) == 4 || !(args.form & ROUND_ONCE);
    InOrderArgs in{};
    bool dense;
    if (rounds && !(args.form & INTERLEAVED) && args.rotary > 0 && in_order<T>(args, in, dense)) {
      const dim3 grid(in.blocks + (in.of[1].packs + IN_ORDER - 1) / IN_ORDER, static_cast<unsigned>(args.batches));
      return dense ? launch(rotate_in_order<T, true>, grid, dim3(IN_ORDER), 0, device, in)
                   : launch(rotate_in_order<T, false>, grid, dim3(IN_ORDER), 0, device, in);
    }
  }
  // A warp to a token where there are many tokens, else a head to a thread. On H200 94 us of a shape in halves, when those came
  // here, and 117 with ten times the threads.
  const bool many = tokens >= device.multiprocessors;
  const int together = std::max(1, std::min((many ? 32 : 256) / pairs, heads));
  const unsigned parts = many ? 1 : static_cast<unsigned>(std::min((heads + together - 1) / together, 65535));
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

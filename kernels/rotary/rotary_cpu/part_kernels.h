// The functions of parts.h for one level; included by one source file per level, after simd.h, inside its namespace.

// Each lane in its neighbour's place: 1, 0, 3, 2, ...
KH_INLINE V neighbours(V v) {
#if KERNELHUB_LEVEL == 2
  return _mm512_permute_ps(v, 0xb1);
#elif KERNELHUB_LEVEL == 1
  return _mm256_permute_ps(v, 0xb1);
#else
  return V{v[1], v[0], v[3], v[2]};
#endif
}

// L elements for L / 2 pairs: 0, 0, 1, 1, ...
template <typename T>
KH_INLINE V load_twice(const T* p, int64_t pairs) {
  T twice[L];
  for (int64_t lane = 0; lane < L; ++lane) {
    twice[lane] = lane / 2 < pairs ? p[lane / 2] : T{};
  }
  return load(twice);
}

template <typename T>
KH_INLINE V get(const T* p, int64_t count) {
  return count == L ? load(p) : load_some(p, count);
}
template <typename T>
KH_INLINE void put(T* p, V v, int64_t count) {
  count == L ? store(p, v) : store_some(p, v, count);
}

// x * cos + other * sin, rounded where PyTorch's three operations round to R.
template <typename R>
KH_INLINE V turned(V x, V cos, V other, V sin) {
  return rounded<R>(x * cos) + rounded<R>(other * sin);
}

// `each(i, count)` for n elements from 0 on: L at a time. The last L begin where they must, and overlap the ones before.
template <typename Each>
KH_INLINE void for_vectors(int64_t n, const Each& each) {
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    each(i, int64_t{L});
  }
  if (i < n) {
    n >= L ? each(n - L, int64_t{L}) : each(i, n);
  }
}

// One head of one token whose pairs are i and i + rotary / 2.
template <typename T, typename C, typename R>
KH_INLINE void rotate_halves(const Part& of, const T* x, T* y, const C* cos, const C* sin) {
  const int64_t half = of.rotary / 2, second = of.paired ? 0 : half;
  // The first element of a pair takes -sin of its own place, transposed sin of the other one's.
  const C* sin_first = sin + (of.transposed ? second : 0);
  const C* sin_second = sin + (of.transposed ? 0 : second);
  const V minus = set(of.inverse != of.transposed ? 1.0f : -1.0f), plus = set(0.0f) - minus;
  for_vectors(half, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V a = get(x + i, count), b = get(x + half + i, count);
    put(y + i, turned<R>(a, get(cos + i, count), b, minus * get(sin_first + i, count)), count);
    put(y + half + i, turned<R>(b, get(cos + second + i, count), a, plus * get(sin_second + i, count)), count);
  });
}

// One head of one token whose pairs are 2i and 2i + 1.
template <typename T, typename C, typename R>
KH_INLINE void rotate_neighbours(const Part& of, const T* x, T* y, const C* cos, const C* sin) {
  float sign[L];
  for (int lane = 0; lane < L; ++lane) {
    sign[lane] = (lane % 2 == 0) == (of.inverse != of.transposed) ? 1.0f : -1.0f;
  }
  const V signs = load(sign);
  for_vectors(of.rotary, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V v = get(x + i, count);
    const V c = of.paired ? load_twice(cos + i / 2, count / 2) : get(cos + i, count);
    V s = of.paired ? load_twice(sin + i / 2, count / 2) : get(sin + i, count);
    s = of.transposed ? neighbours(s) : s;
    put(y + i, turned<R>(v, c, neighbours(v), signs * s), count);
  });
}

// T: the elements; C: those of cos and sin; R: what products are rounded to.
template <typename T, typename C, typename R, bool NEIGHBOURS>
void rotate(const Part& of) {
  const T* x = static_cast<const T*>(of.x);
  T* y = static_cast<T*>(of.y);
  const C* cos = static_cast<const C*>(of.cos);
  const C* sin = static_cast<const C*>(of.sin);
  const auto one = [&](int64_t head, int64_t token) KH_LAMBDA {
    const T* from = x + head * of.x_head + token * of.x_token;
    T* to = y + head * of.y_head + token * of.y_token;
    if constexpr (NEIGHBOURS) {
      rotate_neighbours<T, C, R>(of, from, to, cos + token * of.cos_token, sin + token * of.sin_token);
    } else {
      rotate_halves<T, C, R>(of, from, to, cos + token * of.cos_token, sin + token * of.sin_token);
    }
    if (of.rotary < of.width) {
      __builtin_memcpy(to + of.rotary, from + of.rotary, (of.width - of.rotary) * sizeof(T));
    }
  };
  // In the order in which the results lie in memory.
  if (of.y_head > of.y_token) {
    for (int64_t head = 0; head < of.heads; ++head) {
      for (int64_t token = 0; token < of.tokens; ++token) {
        one(head, token);
      }
    }
  } else {
    for (int64_t token = 0; token < of.tokens; ++token) {
      for (int64_t head = 0; head < of.heads; ++head) {
        one(head, token);
      }
    }
  }
}

#define KH_PAIRS(T, C, R) {rotate<T, C, R, false>, rotate<T, C, R, true>}
#define KH_TABLES(T) {KH_PAIRS(T, T, T), KH_PAIRS(T, T, float), KH_PAIRS(T, float, float)}

const Parts parts = {{KH_TABLES(float), KH_TABLES(BFloat16), KH_TABLES(Half)}};

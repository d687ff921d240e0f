// The functions of elements.h for one level; included by one source file per level, after simd.h, inside its namespace.

// The error function, off by at most 1.5e-7: formula 7.1.26 of Abramowitz and Stegun, in ATen's order of operations.
KH_INLINE V error_function(V x) {
  const V size = absolute(x), one = set(1.0f);
  const V t = one / fma(set(0.3275911f), size, one);
  V r = fma(set(1.061405429f), t, set(-1.453152027f));
  r = fma(r, t, set(1.421413741f));
  r = fma(r, t, set(-0.284496736f));
  r = fma(r, t, set(0.254829592f));
  const V tail = -exponential(-(x * x)) * t;
  const V positive = fma(tail, r, one);
  return with_sign(positive, x);
}

// tanh's argument in the approximation of GELU, doubled: x / 2 * (1 + tanh(u)) is x * sigmoid(2 * u), which does not
// cancel where tanh(u) is close to -1.
KH_INLINE V doubled_argument(V x) {
  return set(1.5957691216057308f) * fma(set(0.044715f) * x * x, x, x);
}

// Rounded to T where models' own code rounds in between, which only that of the quick GELU does.
template <typename T, int FUNCTION>
KH_INLINE V value(V x) {
  const V one = set(1.0f), half = set(0.5f);
  if constexpr (FUNCTION == SILU) {
    return silu(x);
  } else if constexpr (FUNCTION == GELU) {
    return x * half * (one + error_function(x * set(0.7071067811865476f)));
  } else if constexpr (FUNCTION == GELU_TANH) {
    return x / (one + exponential(-doubled_argument(x)));
  } else {
    return x * rounded<T>(sigmoid(rounded<T>(x * set(1.702f))));
  }
}

template <int FUNCTION>
KH_INLINE V slope(V x) {
  const V one = set(1.0f), half = set(0.5f);
  if constexpr (FUNCTION == SILU) {
    const V s = sigmoid(x);
    return s * fma(x, one - s, one);
  } else if constexpr (FUNCTION == GELU) {
    const V below = half * (one + error_function(x * set(0.7071067811865476f)));
    return fma(x, set(0.3989422804014327f) * exponential(-half * x * x), below);
  } else if constexpr (FUNCTION == GELU_TANH) {
    const V s = sigmoid(doubled_argument(x));
    const V inner = set(1.5957691216057308f) * fma(set(0.134145f) * x, x, one);
    return s * fma(x * inner, one - s, one);
  } else {
    const V z = x * set(1.702f), s = sigmoid(z);
    return s * fma(z, one - s, one);
  }
}

template <typename T>
KH_INLINE V get(const void* from, int64_t i, int64_t count) {
  const T* p = static_cast<const T*>(from) + i;
  return count == L ? load(p) : load_some(p, count);
}
template <typename T>
KH_INLINE void put(void* to, int64_t i, int64_t count, V v) {
  T* p = static_cast<T*>(to) + i;
  count == L ? store(p, v) : store_some(p, v, count);
}

// `each(i, count)` for the elements from i on: L at a time, then the tail.
template <typename Each>
KH_INLINE void for_each(int64_t n, const Each& each) {
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    each(i, int64_t{L});
  }
  if (i < n) {
    each(i, n - i);
  }
}

template <typename T, int FUNCTION>
void apply(const Elements& of) {
  for_each(of.n, [&](int64_t i, int64_t count) KH_LAMBDA { put<T>(of.y, i, count, value<T, FUNCTION>(get<T>(of.a, i, count))); });
}

template <typename T, int FUNCTION>
void apply_backward(const Elements& of) {
  for_each(of.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    put<T>(of.a_grad, i, count, get<T>(of.grad, i, count) * slope<FUNCTION>(get<T>(of.a, i, count)));
  });
}

template <typename T, int FUNCTION>
void multiply(const Elements& of) {
  for_each(of.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V f = rounded<T>(value<T, FUNCTION>(get<T>(of.a, i, count)));
    put<T>(of.y, i, count, f * get<T>(of.b, i, count));
  });
}

template <typename T, int FUNCTION>
void multiply_backward(const Elements& of) {
  for_each(of.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V grad = get<T>(of.grad, i, count), a = get<T>(of.a, i, count), b = get<T>(of.b, i, count);
    put<T>(of.a_grad, i, count, grad * b * slope<FUNCTION>(a));
    put<T>(of.b_grad, i, count, grad * rounded<T>(value<T, FUNCTION>(a)));
  });
}

#define KH_FUNCTIONS(OP, T) {OP<T, SILU>, OP<T, GELU>, OP<T, GELU_TANH>, OP<T, GELU_QUICK>}
#define KH_DTYPES(OP) {KH_FUNCTIONS(OP, float), KH_FUNCTIONS(OP, BFloat16), KH_FUNCTIONS(OP, Half)}

const Table table = {
    KH_DTYPES(apply),
    KH_DTYPES(apply_backward),
    KH_DTYPES(multiply),
    KH_DTYPES(multiply_backward),
};

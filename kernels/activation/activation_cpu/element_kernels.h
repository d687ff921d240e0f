// The functions of elements.h for one level; included by one source file per level, after simd.h, inside its namespace.

// The error function, at most 1 ulp off: x + x * p(x * x) near 0, 1 - exp(-q(|x|)) beyond. The polynomials interpolate
// erf(x) / x - 1 and -log(erfc(x)) at the zeros of Chebyshev polynomials of degree 7 and 10; above 4 it is 1.
KH_INLINE V error_function(V x) {
  const V square = x * x, size = if_less(set(4.0f), absolute(x), set(4.0f), absolute(x));
  V p = set(8.52940138e-05f);
  p = fma(p, square, set(-0.000817963213f));
  p = fma(p, square, set(0.00520422682f));
  p = fma(p, square, set(-0.0268606655f));
  p = fma(p, square, set(0.11283718f));
  p = fma(p, square, set(-0.376126349f));
  p = fma(p, square, set(0.128379166f));
  V q = set(4.54027003e-08f);
  q = fma(q, size, set(-2.58614227e-06f));
  q = fma(q, size, set(5.45747243e-05f));
  q = fma(q, size, set(-0.000639680598f));
  q = fma(q, size, set(0.00489226496f));
  q = fma(q, size, set(-0.02668087f));
  q = fma(q, size, set(0.110398538f));
  q = fma(q, size, set(0.631593883f));
  q = fma(q, size, set(1.13032234f));
  q = fma(q, size, set(-0.000332992349f));
  const V far = with_sign(set(1.0f) - exponential(-q), x);
  return if_less(absolute(x), set(0.875f), fma(p, x, x), far);
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
    const Logistic of = logistic(x);
    return fma(x, of.slope, of.value);
  } else if constexpr (FUNCTION == GELU) {
    const V below = half * (one + error_function(x * set(0.7071067811865476f)));
    return fma(x, set(0.3989422804014327f) * exponential(-half * x * x), below);
  } else if constexpr (FUNCTION == GELU_TANH) {
    const Logistic of = logistic(doubled_argument(x));
    const V inner = set(1.5957691216057308f) * fma(set(0.134145f) * x, x, one);
    return fma(x * of.slope, inner, of.value); // zero times what is finite for longer than x * inner
  } else {
    const V z = x * set(1.702f);
    const Logistic of = logistic(z);
    return fma(z, of.slope, of.value);
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
    const V f = rounded<T>(value<T, FUNCTION>(a));
    put<T>(of.b_grad, i, count, grad * f);
    if (of.y != nullptr) {
      put<T>(of.y, i, count, f * b);
    }
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

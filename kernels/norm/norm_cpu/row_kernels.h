// The functions of rows.h for one level; included by one source file per level, after simd.h, inside its namespace.

constexpr int BLOCK = 32; // 8 lanes x 4 accumulators

// The end of a sum: its lanes, and what is left behind the last block. Of that, whole vectors of 8 go into the first
// accumulator, single elements by themselves.
KH_NO_INLINE float sum_of_lanes(float* lanes, const float* rest, int64_t left) {
  for (int64_t i = 0; i + 8 <= left; i += 8) {
    for (int lane = 0; lane < 8; ++lane) {
      lanes[lane] += rest[i + lane];
    }
  }
  for (int k = 1; k < 4; ++k) {
    for (int lane = 0; lane < 8; ++lane) {
      lanes[lane] += lanes[k * 8 + lane];
    }
  }
  float total = 0.0f;
  for (int64_t i = left / 8 * 8; i < left; ++i) {
    total += rest[i];
  }
  for (int lane = 0; lane < 8; ++lane) {
    total += lanes[lane];
  }
  return total;
}

// The sum of `at(i)` over n elements in the order in which ATen sums an inner dimension: 8 lanes x 4 accumulators, which
// are emptied into others every 16 steps (or more, for very long rows), so that rounding errors stay small. The same
// order whatever the vectors' width: so results are the same on every level, and the same as PyTorch's.
//
// `at(i, count)` gives the elements from i on as a vector, `count` of them, the rest zeros; count is L but for the tail.
template <typename At>
KH_INLINE float cascade_sum(int64_t n, const At& at) {
  constexpr int LEVELS = 4, VECTORS = BLOCK / L;
  const int64_t blocks = n / BLOCK;
  int ceil_log2 = 0;
  while ((int64_t{1} << ceil_log2) < blocks) {
    ++ceil_log2;
  }
  const int power = ceil_log2 / LEVELS > 4 ? ceil_log2 / LEVELS : 4;
  const int64_t step = int64_t{1} << power;
  V sums[LEVELS][VECTORS];
  for (int level = 0; level < LEVELS; ++level) {
    for (int k = 0; k < VECTORS; ++k) {
      sums[level][k] = set(0.0f);
    }
  }
  V now[VECTORS];
  for (int k = 0; k < VECTORS; ++k) {
    now[k] = set(0.0f);
  }
  int64_t block = 0;
  while (block + step <= blocks) {
    for (int64_t end = block + step; block < end; ++block) {
      for (int k = 0; k < VECTORS; ++k) {
        now[k] = now[k] + at(block * BLOCK + k * L, L);
      }
    }
    for (int k = 0; k < VECTORS; ++k) {
      sums[1][k] = sums[1][k] + now[k];
      now[k] = set(0.0f);
    }
    for (int level = 2; level < LEVELS && (block & ((step - 1) << ((level - 1) * power))) == 0; ++level) {
      for (int k = 0; k < VECTORS; ++k) {
        sums[level][k] = sums[level][k] + sums[level - 1][k];
        sums[level - 1][k] = set(0.0f);
      }
    }
  }
  for (; block < blocks; ++block) {
    for (int k = 0; k < VECTORS; ++k) {
      now[k] = now[k] + at(block * BLOCK + k * L, L);
    }
  }
  for (int level = 1; level < LEVELS; ++level) {
    for (int k = 0; k < VECTORS; ++k) {
      now[k] = now[k] + sums[level][k];
    }
  }
  alignas(64) float lanes[BLOCK], rest[BLOCK];
  for (int k = 0; k < VECTORS; ++k) {
    store(lanes + k * L, now[k]);
  }
  const int64_t left = n - blocks * BLOCK;
  for (int64_t i = 0; i < left; i += L) {
    store(rest + i, at(blocks * BLOCK + i, left - i < L ? left - i : L));
  }
  return sum_of_lanes(lanes, rest, left);
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

template <typename T>
KH_INLINE V get(const void* row, int64_t i, int64_t count) {
  const T* p = static_cast<const T*>(row) + i;
  return count == L ? load(p) : load_some(p, count);
}
template <typename T>
KH_INLINE void put(void* row, int64_t i, int64_t count, V v) {
  T* p = static_cast<T*>(row) + i;
  count == L ? store(p, v) : store_some(p, v, count);
}
// The same, and what v is then.
template <typename T>
KH_INLINE V put_rounded(void* row, int64_t i, int64_t count, V v) {
  put<T>(row, i, count, v);
  return sizeof(T) == sizeof(float) ? v : get<T>(row, i, count);
}

KH_INLINE float scale_of(float squares, int64_t n, float eps) {
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps);
}

// The passes of which the functions of the table consist. None is inlined, so that each is compiled once.

template <typename T>
KH_NO_INLINE float squares(const void* x, int64_t n) {
  return cascade_sum(n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V of = get<T>(x, i, count);
    return of * of;
  });
}

// x / rms(x) in float32 -> times the weight, rounded first where the form says so. The offset is 1, or else -0, which added
// to anything leaves it as it is.
template <typename T, bool FIRST>
KH_INLINE V weighted(V normal, V weight, V offset) {
  if constexpr (FIRST) {
    return rounded<T>(normal) * weight;
  } else {
    return normal * (offset + weight);
  }
}

// The row of which the scale is known.
template <typename From, typename T, bool FIRST>
KH_NO_INLINE void scaled(const RmsRow& row) {
  const V scale = set(row.scale), offset = set(row.offset);
  const void *x = row.before, *weight = row.weight;
  void* y = row.y;
  for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    put<T>(y, i, count, weighted<T, FIRST>(get<From>(x, i, count) * scale, get<T>(weight, i, count), offset));
  });
}

// The sum of x and the residual, rounded, and its squares.
template <typename T>
KH_INLINE V add_square(const RmsRow& row, int64_t i, int64_t count) {
  const V of = put_rounded<T>(row.sum, i, count, get<T>(row.x, i, count) + get<T>(row.residual, i, count));
  return of * of;
}

template <typename T>
KH_NO_INLINE float add_squares(const RmsRow& of) {
  const RmsRow row = of;
  return cascade_sum(row.n, [&](int64_t i, int64_t count) KH_LAMBDA { return add_square<T>(row, i, count); });
}

// And meanwhile the row before is finished, as by `scaled`: so memory is read from and written to all the time. One row
// after another, it was read while squares were summed, and then only written.
template <typename T, bool FIRST>
KH_NO_INLINE float add_squares_and_scaled(const RmsRow& of) {
  const RmsRow row = of;
  const V scale = set(row.scale), offset = set(row.offset);
  return cascade_sum(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V normal = get<T>(row.before, i, count) * scale;
    put<T>(row.y, i, count, weighted<T, FIRST>(normal, get<T>(row.weight, i, count), offset));
    return add_square<T>(row, i, count);
  });
}

template <typename T, bool FIRST>
void rms(const RmsRow& of) {
  RmsRow row = of;
  row.before = row.x;
  row.scale = scale_of(squares<T>(row.x, row.n), row.n, row.eps);
  scaled<T, T, FIRST>(row);
}

template <typename T, bool FIRST>
float add_rms(const RmsRow& row) {
  const float sum = row.before == nullptr ? add_squares<T>(row) : add_squares_and_scaled<T, FIRST>(row);
  return scale_of(sum, row.n, row.eps);
}

template <typename T, bool FIRST>
void last_rms(const RmsRow& row) {
  scaled<T, T, FIRST>(row);
}

// silu(gate) or, with 1 for z, sigmoid(gate).
KH_INLINE V gate_factor(V gate, V z) { return z / (set(1.0f) + exponential(-gate)); }

template <typename T, bool FIRST>
void gated(const RmsRow& of) {
  const RmsRow row = of;
  const V scale = set(scale_of(squares<T>(row.x, row.n), row.n, row.eps)), offset = set(row.offset);
  for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    V y = weighted<T, FIRST>(get<T>(row.x, i, count) * scale, get<T>(row.weight, i, count), offset);
    if constexpr (FIRST) {
      y = rounded<T>(y);
    }
    const V gate = get<T>(row.gate, i, count);
    put<T>(row.y, i, count, y * gate_factor(gate, row.is_silu ? gate : set(1.0f)));
  });
}

// x * silu(gate) in float32.
template <typename T>
KH_NO_INLINE void gated_input(const void* x, const void* gate, float* to, int64_t n) {
  for_each(n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V z = get<T>(gate, i, count);
    put<float>(to, i, count, get<T>(x, i, count) * gate_factor(z, z));
  });
}

template <typename T, bool FIRST>
void gated_first(const RmsRow& row) {
  gated_input<T>(row.x, row.gate, row.scratch, row.n);
  RmsRow inner = row;
  inner.before = row.scratch;
  inner.scale = scale_of(squares<float>(row.scratch, row.n), row.n, row.eps);
  scaled<float, T, FIRST>(inner);
}

// With g = grad * (offset + weight) and h = x / rms(x): x_grad = (g - h * mean(g * h)) / rms(x), weight_grad = grad * h.
template <typename T>
KH_NO_INLINE void rms_backward_scaled(const RmsBackwardRow& row, float scale) {
  const V r = set(scale), offset = set(row.offset);
  if (row.weight_grad != nullptr) {
    for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
      const V grad = get<T>(row.grad, i, count), h = get<T>(row.x, i, count) * r;
      put<float>(row.weight_grad, i, count, fma(grad, h, get<float>(row.weight_grad, i, count)));
    });
  }
  const float product = cascade_sum(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V g = get<T>(row.grad, i, count) * (offset + get<T>(row.weight, i, count));
    return g * get<T>(row.x, i, count);
  });
  // h * mean(g * h) = x * (sum(g * x) * r * r / n)
  const V back = set(product * scale * scale / static_cast<float>(row.n));
  for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V g = get<T>(row.grad, i, count) * (offset + get<T>(row.weight, i, count));
    V grad = (g - get<T>(row.x, i, count) * back) * r;
    if (row.sum_grad != nullptr) {
      grad = grad + get<T>(row.sum_grad, i, count);
    }
    put<T>(row.x_grad, i, count, grad);
  });
}

template <typename T>
void rms_backward(const RmsBackwardRow& row) {
  rms_backward_scaled<T>(row, scale_of(squares<T>(row.x, row.n), row.n, row.eps));
}

// Of y = a * f(gate): the gradients of both. `of_a` may be where `grad` or `a` is.
KH_NO_INLINE void gate_backward(
    const float* grad, const float* a, const float* gate, bool is_silu, float* of_a, float* of_gate, int64_t n) {
  for_each(n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V z = get<float>(gate, i, count), from = get<float>(grad, i, count);
    const Logistic of = logistic(z);
    const V slope = is_silu ? fma(z, of.slope, of.value) : of.slope;
    const V factor = is_silu ? z * of.value : of.value;
    const V gate_grad = from * get<float>(a, i, count) * slope;
    put<float>(of_a, i, count, from * factor);
    put<float>(of_gate, i, count, gate_grad);
  });
}

// y = h * weight * f(gate) with h = x / rms(x); or h = v / rms(v), v = x * f(gate), where the gate comes first.
void gated_backward(const GatedBackwardRow& row) {
  RmsBackwardRow inner{};
  inner.weight = row.weight;
  inner.weight_grad = row.weight_grad;
  inner.n = row.n;
  inner.offset = -0.0f;
  const bool is_silu = row.gate_kind != SIGMOID;
  if (row.gate_kind == SILU_FIRST) {
    gated_input<float>(row.x, row.gate, row.scratch, row.n);
    inner.grad = row.grad;
    inner.x = row.scratch;
    inner.x_grad = row.scratch;
    rms_backward_scaled<float>(inner, scale_of(squares<float>(row.scratch, row.n), row.n, row.eps));
    gate_backward(row.scratch, row.x, row.gate, true, row.x_grad, row.gate_grad, row.n);
  } else {
    const float scale = scale_of(squares<float>(row.x, row.n), row.n, row.eps);
    RmsRow forward{};
    forward.weight = row.weight;
    forward.y = row.scratch;
    forward.before = row.x;
    forward.n = row.n;
    forward.scale = scale;
    forward.offset = -0.0f;
    scaled<float, float, false>(forward);
    gate_backward(row.grad, row.scratch, row.gate, is_silu, row.scratch, row.gate_grad, row.n);
    inner.grad = row.scratch;
    inner.x = row.x;
    inner.x_grad = row.x_grad;
    rms_backward_scaled<float>(inner, scale);
  }
}

// By how much the mean, rounded as it is, is wrong: the mean of the differences from it.
template <typename T>
KH_NO_INLINE float mean_away(const void* x, int64_t n, float from) {
  const V middle = set(from);
  return cascade_sum(n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V away = get<T>(x, i, count) - middle;
    if (count == L) {
      return away;
    }
    alignas(64) float lanes[L]; // the zeros behind the tail are away from the mean, too
    store(lanes, away);
    return load_some(lanes, count);
  }) / static_cast<float>(n);
}

// In two passes over the row, which lies in the cache by then: sums of squares alone would cancel. `first(i, count)` gives the
// elements in the first of them. Where the mean is more than FAR times the deviation, its own rounding shows beside that, and a
// third pass takes it back: of a row of equal elements every difference is 0 then.
template <typename T, typename First>
KH_INLINE Moments moments_by(const void* x, int64_t n, float eps, const First& first) {
  constexpr float FAR = 8.0f;
  const float mean = cascade_sum(n, first) / static_cast<float>(n);
  const V middle = set(mean);
  const float squares = cascade_sum(n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V away = get<T>(x, i, count) - middle;
    if (count == L) {
      return away * away;
    }
    alignas(64) float lanes[L]; // the zeros behind the tail are away from the mean, too
    store(lanes, away * away);
    return load_some(lanes, count);
  });
  if (mean * mean <= FAR * FAR / static_cast<float>(n) * squares) {
    return {mean, scale_of(squares, n, eps)};
  }
  const float off = mean_away<T>(x, n, mean);
  return {mean + off, scale_of(squares - static_cast<float>(n) * off * off, n, eps)};
}

template <typename T>
KH_NO_INLINE Moments moments(const void* x, int64_t n, float eps) {
  return moments_by<T>(x, n, eps, [&](int64_t i, int64_t count) KH_LAMBDA { return get<T>(x, i, count); });
}

template <typename T>
KH_INLINE void put_layer(const LayerRow& row, V mean, V scale, int64_t i, int64_t count) {
  const V y = (get<T>(row.before, i, count) - mean) * scale;
  const V w = row.weight != nullptr ? get<T>(row.weight, i, count) : set(1.0f);
  const V b = row.bias != nullptr ? get<T>(row.bias, i, count) : set(0.0f);
  put<T>(row.y, i, count, fma(y, w, b));
}

template <typename T>
KH_NO_INLINE Moments moments_and_layer(const LayerRow& of) {
  const LayerRow row = of;
  const V mean = set(row.found.mean), scale = set(row.found.scale);
  return moments_by<T>(row.x, row.n, row.eps, [&](int64_t i, int64_t count) KH_LAMBDA {
    put_layer<T>(row, mean, scale, i, count);
    return get<T>(row.x, i, count);
  });
}

template <typename T>
Moments layer(const LayerRow& row) {
  return row.before == nullptr ? moments<T>(row.x, row.n, row.eps) : moments_and_layer<T>(row);
}

template <typename T>
void last_layer(const LayerRow& of) {
  const LayerRow row = of;
  const V mean = set(row.found.mean), scale = set(row.found.scale);
  for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA { put_layer<T>(row, mean, scale, i, count); });
}

void add(float* to, const float* from, int64_t n) {
  for_each(n, [&](int64_t i, int64_t count) KH_LAMBDA {
    put<float>(to, i, count, get<float>(to, i, count) + get<float>(from, i, count));
  });
}

// With g = grad * weight and h = (x - mean) * scale: x_grad = (g - mean(g) - h * mean(g * h)) * scale.
template <typename T>
void layer_backward(const LayerBackwardRow& row) {
  const Moments found = moments<T>(row.x, row.n, row.eps);
  const V mean = set(found.mean), scale = set(found.scale);
  const auto g = [&](int64_t i, int64_t count) KH_LAMBDA {
    const V grad = get<T>(row.grad, i, count);
    return row.weight != nullptr ? grad * get<T>(row.weight, i, count) : grad;
  };
  const auto h = [&](int64_t i, int64_t count)
                     KH_LAMBDA { return (get<T>(row.x, i, count) - mean) * scale; };
  const float n = static_cast<float>(row.n);
  if (row.weight_grad != nullptr) {
    for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
      const V grad = get<T>(row.grad, i, count);
      put<float>(row.weight_grad, i, count, fma(grad, h(i, count), get<float>(row.weight_grad, i, count)));
    });
  }
  if (row.bias_grad != nullptr) {
    for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
      put<float>(row.bias_grad, i, count, get<float>(row.bias_grad, i, count) + get<T>(row.grad, i, count));
    });
  }
  const float first = cascade_sum(row.n, [&](int64_t i, int64_t count) KH_LAMBDA { return g(i, count); }) / n;
  const float second =
      cascade_sum(row.n, [&](int64_t i, int64_t count) KH_LAMBDA { return g(i, count) * h(i, count); }) / n;
  const V constant = set(first), slope = set(second);
  for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    put<T>(row.x_grad, i, count, (g(i, count) - constant - h(i, count) * slope) * scale);
  });
}

template <typename T>
void widen_row(float* to, const void* from, int64_t n) {
  for_each(n, [&](int64_t i, int64_t count) KH_LAMBDA { put<float>(to, i, count, get<T>(from, i, count)); });
}

template <typename T>
void narrow_row(void* to, const float* from, int64_t n) {
  for_each(n, [&](int64_t i, int64_t count) KH_LAMBDA { put<T>(to, i, count, get<float>(from, i, count)); });
}

// In float32 there is nothing to round.
#define KH_ROUNDED(FUNCTION) \
  {{FUNCTION<float, false>, FUNCTION<float, false>}, \
   {FUNCTION<BFloat16, false>, FUNCTION<BFloat16, true>}, \
   {FUNCTION<Half, false>, FUNCTION<Half, true>}}
#define KH_DTYPES(FUNCTION) {FUNCTION<float>, FUNCTION<BFloat16>, FUNCTION<Half>}

const Rows rows = {
    KH_ROUNDED(rms),
    KH_ROUNDED(add_rms),
    KH_ROUNDED(last_rms),
    KH_DTYPES(rms_backward),
    KH_ROUNDED(gated),
    {gated_first<float, false>, gated_first<BFloat16, true>, gated_first<Half, true>},
    gated_backward,
    KH_DTYPES(layer),
    KH_DTYPES(last_layer),
    KH_DTYPES(layer_backward),
    add,
    KH_DTYPES(widen_row),
    KH_DTYPES(narrow_row),
};

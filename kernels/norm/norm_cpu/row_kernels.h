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

KH_INLINE float scale_of(float squares, int64_t n, float eps) {
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps);
}

// x / rms(x) in float32 -> times the weight, rounded as the form says.
template <typename T, int FORM>
KH_INLINE V weighted(V normal, V weight) {
  if constexpr (FORM == CAST_FIRST) {
    return rounded<T>(normal) * weight;
  } else if constexpr (FORM == CAST_LAST) {
    return normal * weight;
  } else {
    return normal * (set(1.0f) + weight);
  }
}

template <typename T, int FORM>
void rms(const RmsRow& row) {
  const float squares = cascade_sum(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V x = get<T>(row.x, i, count);
    return x * x;
  });
  const V scale = set(scale_of(squares, row.n, row.eps));
  for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V normal = get<T>(row.x, i, count) * scale;
    put<T>(row.y, i, count, weighted<T, FORM>(normal, get<T>(row.weight, i, count)));
  });
}

template <typename T, int FORM>
void add_rms(const RmsRow& row) {
  for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    put<T>(row.sum, i, count, get<T>(row.x, i, count) + get<T>(row.residual, i, count));
  });
  RmsRow next = row;
  next.x = row.sum;
  rms<T, FORM>(next);
}

// The factor by which a gradient of the result is one of x / rms(x).
template <int FORM>
KH_INLINE V factor(V weight) {
  return FORM == ZERO_CENTERED ? set(1.0f) + weight : weight;
}

// With g = grad * factor and h = x / rms(x): x_grad = (g - h * mean(g * h)) / rms(x), weight_grad = grad * h.
template <typename T, int FORM>
void rms_backward(const RmsBackwardRow& row) {
  const float squares = cascade_sum(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V x = get<T>(row.x, i, count);
    return x * x;
  });
  const float scale = scale_of(squares, row.n, row.eps);
  const V r = set(scale);
  if (row.weight_grad != nullptr) {
    for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
      const V grad = get<T>(row.grad, i, count), h = get<T>(row.x, i, count) * r;
      put<float>(row.weight_grad, i, count, fma(grad, h, get<float>(row.weight_grad, i, count)));
    });
  }
  const float product = cascade_sum(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V g = get<T>(row.grad, i, count) * factor<FORM>(get<T>(row.weight, i, count));
    return g * get<T>(row.x, i, count);
  });
  // h * mean(g * h) = x * (sum(g * x) * r * r / n)
  const V back = set(product * scale * scale / static_cast<float>(row.n));
  for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V g = get<T>(row.grad, i, count) * factor<FORM>(get<T>(row.weight, i, count));
    V grad = (g - get<T>(row.x, i, count) * back) * r;
    if (row.sum_grad != nullptr) {
      grad = grad + get<T>(row.sum_grad, i, count);
    }
    put<T>(row.x_grad, i, count, grad);
  });
}

template <int GATE>
KH_INLINE V gate_factor(V gate) {
  return GATE == SIGMOID ? sigmoid(gate) : silu(gate);
}

template <typename T, int FORM, int GATE>
void gated(const RmsRow& row) {
  const auto input = [&](int64_t i, int64_t count) KH_LAMBDA {
    const V x = get<T>(row.x, i, count);
    return GATE == SILU_FIRST ? x * silu(get<T>(row.gate, i, count)) : x;
  };
  const float squares = cascade_sum(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V x = input(i, count);
    return x * x;
  });
  const V scale = set(scale_of(squares, row.n, row.eps));
  for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V normal = input(i, count) * scale, weight = get<T>(row.weight, i, count);
    if constexpr (GATE == SILU_FIRST) {
      put<T>(row.y, i, count, weighted<T, FORM>(normal, weight));
    } else {
      V y = weighted<T, FORM>(normal, weight);
      if constexpr (FORM == CAST_FIRST) {
        y = rounded<T>(y);
      }
      put<T>(row.y, i, count, y * gate_factor<GATE>(get<T>(row.gate, i, count)));
    }
  });
}

// d silu(z) / dz and d sigmoid(z) / dz.
template <int GATE>
KH_INLINE V gate_slope(V gate) {
  const Logistic of = logistic(gate);
  return GATE == SIGMOID ? of.slope : fma(gate, of.slope, of.value);
}

// y = h * weight * f(gate) with h = x / rms(x); or h = v / rms(v), v = x * f(gate), where the gate comes first.
template <typename T, int GATE>
void gated_backward(const GatedBackwardRow& row) {
  const auto input = [&](int64_t i, int64_t count) KH_LAMBDA {
    const V x = get<T>(row.x, i, count);
    return GATE == SILU_FIRST ? x * silu(get<T>(row.gate, i, count)) : x;
  };
  const float squares = cascade_sum(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V x = input(i, count);
    return x * x;
  });
  const float scale = scale_of(squares, row.n, row.eps);
  const V r = set(scale);
  for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V grad = get<T>(row.grad, i, count), gate = get<T>(row.gate, i, count);
    const V weight = get<T>(row.weight, i, count), h = input(i, count) * r;
    V of_weighted = grad;
    if constexpr (GATE != SILU_FIRST) {
      of_weighted = grad * gate_factor<GATE>(gate);
      put<T>(row.gate_grad, i, count, grad * h * weight * gate_slope<GATE>(gate));
    }
    put<float>(row.scratch, i, count, of_weighted * weight);
    if (row.weight_grad != nullptr) {
      put<float>(row.weight_grad, i, count, fma(of_weighted, h, get<float>(row.weight_grad, i, count)));
    }
  });
  const float product = cascade_sum(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    return get<float>(row.scratch, i, count) * input(i, count);
  });
  const V back = set(product * scale * scale / static_cast<float>(row.n));
  for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V of_input = (get<float>(row.scratch, i, count) - input(i, count) * back) * r;
    if constexpr (GATE == SILU_FIRST) {
      const V x = get<T>(row.x, i, count), gate = get<T>(row.gate, i, count);
      put<T>(row.x_grad, i, count, of_input * silu(gate));
      put<T>(row.gate_grad, i, count, of_input * x * gate_slope<SILU>(gate));
    } else {
      put<T>(row.x_grad, i, count, of_input);
    }
  });
}

struct Moments {
  float mean, scale;
};

// In two passes over the row, which lies in the cache by then: sums of squares alone would cancel.
template <typename T>
KH_INLINE Moments moments(const void* x, int64_t n, float eps) {
  const float mean = cascade_sum(n, [&](int64_t i, int64_t count) KH_LAMBDA { return get<T>(x, i, count); }) /
      static_cast<float>(n);
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
  return {mean, scale_of(squares, n, eps)};
}

template <typename T>
void layer(const LayerRow& row) {
  const Moments found = moments<T>(row.x, row.n, row.eps);
  const V mean = set(found.mean), scale = set(found.scale);
  const bool weight = row.weight != nullptr, bias = row.bias != nullptr;
  for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    V y = (get<T>(row.x, i, count) - mean) * scale;
    const V w = weight ? get<T>(row.weight, i, count) : set(1.0f);
    const V b = bias ? get<T>(row.bias, i, count) : set(0.0f);
    put<T>(row.y, i, count, fma(y, w, b));
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
  const float first = cascade_sum(row.n, [&](int64_t i, int64_t count) KH_LAMBDA { return g(i, count); }) / n;
  const float second =
      cascade_sum(row.n, [&](int64_t i, int64_t count) KH_LAMBDA { return g(i, count) * h(i, count); }) / n;
  const V constant = set(first), slope = set(second);
  for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    put<T>(row.x_grad, i, count, (g(i, count) - constant - h(i, count) * slope) * scale);
  });
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
}

void add(float* to, const float* from, int64_t n) {
  for_each(n, [&](int64_t i, int64_t count) KH_LAMBDA {
    put<float>(to, i, count, get<float>(to, i, count) + get<float>(from, i, count));
  });
}

template <typename T>
void narrow_row(void* to, const float* from, int64_t n) {
  for_each(n, [&](int64_t i, int64_t count) KH_LAMBDA { put<T>(to, i, count, get<float>(from, i, count)); });
}

// In float32 there is nothing to round, and backwards the two ways of rounding are one.
#define KH_FORMS(FUNCTION, T) {FUNCTION<T, CAST_FIRST>, FUNCTION<T, CAST_LAST>, FUNCTION<T, ZERO_CENTERED>}
#define KH_TWO_FORMS(FUNCTION, T) {FUNCTION<T, CAST_LAST>, FUNCTION<T, CAST_LAST>, FUNCTION<T, ZERO_CENTERED>}
#define KH_GATED(T, FORM, FIRST) {nullptr, gated<T, FORM, SILU>, gated<T, FORM, SIGMOID>, FIRST}
#define KH_GATED_BACKWARD(T) \
  {nullptr, gated_backward<T, SILU>, gated_backward<T, SIGMOID>, gated_backward<T, SILU_FIRST>}
#define KH_GATE_FIRST(T) gated<T, CAST_FIRST, SILU_FIRST>
#define KH_DTYPES(FUNCTION) {FUNCTION<float>, FUNCTION<BFloat16>, FUNCTION<Half>}

const Rows rows = {
    {KH_TWO_FORMS(rms, float), KH_FORMS(rms, BFloat16), KH_FORMS(rms, Half)},
    {KH_TWO_FORMS(add_rms, float), KH_FORMS(add_rms, BFloat16), KH_FORMS(add_rms, Half)},
    {KH_TWO_FORMS(rms_backward, float), KH_TWO_FORMS(rms_backward, BFloat16), KH_TWO_FORMS(rms_backward, Half)},
    {{KH_GATED(float, CAST_LAST, KH_GATE_FIRST(float)), KH_GATED(float, CAST_LAST, nullptr)},
     {KH_GATED(BFloat16, CAST_FIRST, KH_GATE_FIRST(BFloat16)), KH_GATED(BFloat16, CAST_LAST, nullptr)},
     {KH_GATED(Half, CAST_FIRST, KH_GATE_FIRST(Half)), KH_GATED(Half, CAST_LAST, nullptr)}},
    {KH_GATED_BACKWARD(float), KH_GATED_BACKWARD(BFloat16), KH_GATED_BACKWARD(Half)},
    KH_DTYPES(layer),
    KH_DTYPES(layer_backward),
    add,
    KH_DTYPES(narrow_row),
};

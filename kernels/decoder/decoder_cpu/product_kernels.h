// The functions of products.h for one level; included by one source file per level, after simd.h, inside its namespace.

// As kernelhub/activation computes it: x / 2 * (1 + tanh(u)) is x * sigmoid(2 * u), which does not cancel.
KH_INLINE V gelu_tanh(V x) {
  const V doubled = set(1.5957691216057308f) * fma(set(0.044715f) * x * x, x, x);
  return x / (set(1.0f) + exponential(-doubled));
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

KH_INLINE float sum_of(V v) {
  alignas(64) float lanes[L];
  store(lanes, v);
  for (int width = L / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) {
      lanes[lane] += lanes[lane + width];
    }
  }
  return lanes[0];
}

// Elements whose products are summed before they are added to the other sums, so that rounding errors grow with the number of
// sums; and so many of a few outputs' weights stay in the first cache for all rows.
constexpr int64_t BLOCK = 512;

// The sum of the squares of a row with zeros up to whole vectors.
KH_NO_INLINE float squares(const float* x, int64_t padded) {
  V total = set(0.0f);
  for (int64_t begin = 0; begin < padded; begin += BLOCK) {
    const int64_t end = begin + BLOCK < padded ? begin + BLOCK : padded;
    V sum = set(0.0f);
    for (int64_t i = begin; i < end; i += L) {
      const V v = load(x + i);
      sum = fma(v, v, sum);
    }
    total = total + sum;
  }
  return sum_of(total);
}

template <typename T>
void input(const InputRow& of) {
  const InputRow row = of;
  for (int64_t i = row.n; i < row.padded; ++i) {
    row.y[i] = 0.0f;
  }
  for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    V x = get<T>(row.x, i, count);
    if (row.residual != nullptr) {
      x = rounded<T>(x + get<T>(row.residual, i, count));
      put<float>(row.sum, i, count, x);
    }
    put<float>(row.y, i, count, x);
  });
  if (row.form == NO_NORM) {
    return;
  }
  const float scale = 1.0f / __builtin_sqrtf(squares(row.y, row.padded) / static_cast<float>(row.n) + row.eps);
  const V by = set(scale), offset = set(row.form == ZERO_CENTERED ? 1.0f : -0.0f);
  for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    const V normal = get<float>(row.y, i, count) * by, weight = offset + get<T>(row.weight, i, count);
    put<float>(row.y, i, count, rounded<T>((row.form == CAST_FIRST ? rounded<T>(normal) : normal) * weight));
  });
}

// Outputs and rows whose sums are in registers at a time.
#if KERNELHUB_LEVEL == 2
constexpr int OUTPUTS = 6;
#elif KERNELHUB_LEVEL == 1
constexpr int OUTPUTS = 3;
#else
constexpr int OUTPUTS = 2;
#endif
constexpr int TILE = 4;

// Into the second cache: the first holds what is worked on.
KH_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// The sums of four vectors' lanes.
KH_INLINE void sums_of_four(const V* of, float* to) {
#if KERNELHUB_LEVEL == 0
  for (int k = 0; k < 4; ++k) {
    to[k] = (of[k][0] + of[k][2]) + (of[k][1] + of[k][3]);
  }
#else
  __m128 part[4];
  for (int k = 0; k < 4; ++k) {
#if KERNELHUB_LEVEL == 2
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(of[k]), _mm512_extractf32x8_ps(of[k], 1));
#else
    const __m256 half = of[k];
#endif
    part[k] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  _mm_storeu_ps(to, _mm_hadd_ps(_mm_hadd_ps(part[0], part[1]), _mm_hadd_ps(part[2], part[3])));
#endif
}

// What is fetched while a tile is computed: of `count` rows that are `stride` apart, as many elements as the tile has.
struct Ahead {
  const char* begin;
  int64_t stride; // in bytes
  int count;
};

// The products of a tile: R rows and OUTPUTS outputs, `count` elements of each; `sums` begins with them, or gets them added.
template <typename T, int R>
KH_NO_INLINE void tile(
    const T* const* weights, Ahead ahead, const float* x, int64_t x_stride, int64_t count, bool begins, V* sums) {
  V acc[R][OUTPUTS];
  for (int r = 0; r < R; ++r) {
    for (int o = 0; o < OUTPUTS; ++o) {
      acc[r][o] = set(0.0f);
    }
  }
  const T* w[OUTPUTS];
  for (int o = 0; o < OUTPUTS; ++o) {
    w[o] = weights[o];
  }
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    V of[OUTPUTS];
    for (int o = 0; o < OUTPUTS; ++o) {
      of[o] = load(w[o] + i);
    }
    for (int r = 0; r < R; ++r) {
      const V v = load(x + r * x_stride + i);
      for (int o = 0; o < OUTPUTS; ++o) {
        acc[r][o] = fma(v, of[o], acc[r][o]);
      }
    }
    const char* next = ahead.begin + i * static_cast<int64_t>(sizeof(T));
    for (int k = 0; k < ahead.count; ++k) {
      fetch(next);
      next += ahead.stride;
    }
  }
  if (i < count) {
    for (int o = 0; o < OUTPUTS; ++o) {
      const V of = load_some(w[o] + i, count - i);
      for (int r = 0; r < R; ++r) {
        acc[r][o] = fma(load(x + r * x_stride + i), of, acc[r][o]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int o = 0; o < OUTPUTS; ++o) {
      sums[r * OUTPUTS + o] = begins ? acc[r][o] : sums[r * OUTPUTS + o] + acc[r][o];
    }
  }
}

// Tiles from which on weights are copied before they are used, so that they lie side by side in the first cache; those of 16
// bits are widened, and from two on.
constexpr int COPIED = 6;

template <typename T>
void product(const Product& of) {
  const Product job = of;
  const T* const weight = static_cast<const T*>(job.weight);
  alignas(64) float copies[OUTPUTS * BLOCK];
  V sums[ROWS * OUTPUTS + 3]; // so that there are four from any on
  for (int k = 0; k < 3; ++k) {
    sums[job.rows * OUTPUTS + k] = set(0.0f);
  }
  const int tiles = static_cast<int>(job.rows / TILE + (job.rows % TILE) / 4 + (job.rows % 4) / 2 + job.rows % 2);
  const bool copied = tiles >= (sizeof(T) == sizeof(float) ? COPIED : 2);
  const int each = tiles == 1 ? 0 : (OUTPUTS + tiles - 1) / tiles; // rows of weights that a tile fetches
  for (int64_t first = job.begin; first < job.end; first += OUTPUTS) {
    const T* from[OUTPUTS];
    for (int o = 0; o < OUTPUTS; ++o) {
      from[o] = weight + (first + o < job.end ? first + o : job.end - 1) * job.n;
    }
    for (int64_t k = 0; k == 0 || k < job.n; k += BLOCK) { // once where there is nothing, too: zeros
      const int64_t count = k + BLOCK < job.n ? BLOCK : job.n - k;
      const T* now[OUTPUTS];
      for (int o = 0; o < OUTPUTS; ++o) {
        now[o] = from[o] + k;
      }
      const float* wide[OUTPUTS];
      if (copied) {
        for (int o = 0; o < OUTPUTS; ++o) {
          float* to = copies + o * BLOCK;
          wide[o] = to;
          for_each(count, [&](int64_t i, int64_t some) KH_LAMBDA { store(to + i, get<T>(now[o], i, some)); });
        }
      }
      // What comes next: of the same outputs, or else of the outputs after them.
      Ahead ahead{};
      ahead.begin = reinterpret_cast<const char*>(k + BLOCK < job.n ? now[0] + BLOCK : from[0] + OUTPUTS * job.n);
      ahead.stride = job.n * static_cast<int64_t>(sizeof(T));
      int left_to_fetch = OUTPUTS;
      const float* x = job.x + k;
      V* sum = sums;
      const auto run = [&](auto rows) KH_LAMBDA {
        constexpr int R = decltype(rows)::value;
        ahead.count = left_to_fetch < each ? left_to_fetch : each;
        if (copied) {
          tile<float, R>(wide, ahead, x, job.x_stride, count, k == 0, sum);
        } else {
          tile<T, R>(now, ahead, x, job.x_stride, count, k == 0, sum);
        }
        ahead.begin += ahead.count * ahead.stride;
        left_to_fetch -= ahead.count;
        x += R * job.x_stride;
        sum += R * OUTPUTS;
      };
      int64_t left = job.rows;
      for (; left >= TILE; left -= TILE) {
        run(std::integral_constant<int, TILE>{});
      }
      if (TILE > 4 && left >= 4) {
        run(std::integral_constant<int, 4>{});
        left -= 4;
      }
      if (left >= 2) {
        run(std::integral_constant<int, 2>{});
      }
      if (left % 2 == 1) {
        run(std::integral_constant<int, 1>{});
      }
    }
    const int64_t outputs = job.end - first;
    alignas(64) float totals[ROWS * OUTPUTS + 3];
    for (int64_t k = 0; k < job.rows * OUTPUTS; k += 4) {
      sums_of_four(sums + k, totals + k);
    }
    for (int64_t r = 0; r < job.rows; ++r) {
      float* y = job.y + r * job.y_stride + first;
      const float* total = totals + r * OUTPUTS;
      outputs < OUTPUTS ? __builtin_memcpy(y, total, outputs * sizeof(float)) : __builtin_memcpy(y, total, OUTPUTS * sizeof(float));
    }
  }
}

template <typename T, int FUNCTION>
void gated(const Gated& of) {
  const Gated row = of;
  for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    V gate = get<float>(row.gate, i, count), up = get<float>(row.up, i, count);
    if (row.gate_bias != nullptr) {
      gate = gate + get<T>(row.gate_bias, i, count);
    }
    if (row.up_bias != nullptr) {
      up = up + get<T>(row.up_bias, i, count);
    }
    gate = rounded<T>(gate);
    const V f = rounded<T>(FUNCTION == SILU ? silu(gate) : gelu_tanh(gate));
    put<float>(row.gate, i, count, rounded<T>(f * rounded<T>(up)));
  });
}

template <typename T>
void output(const OutputRow& of) {
  const OutputRow row = of;
  for_each(row.n, [&](int64_t i, int64_t count) KH_LAMBDA {
    V y = get<float>(row.x, i, count);
    if (row.bias != nullptr) {
      y = y + get<T>(row.bias, i, count);
    }
    if (row.residual != nullptr) {
      y = rounded<T>(y) + get<float>(row.residual, i, count);
    }
    put<T>(row.y, i, count, y);
  });
}

#define KH_DTYPES(OP) {OP<float>, OP<BFloat16>, OP<Half>}
#define KH_FUNCTIONS(OP, T) {OP<T, SILU>, nullptr, OP<T, GELU_TANH>}

const Table table = {
    KH_DTYPES(input),
    KH_DTYPES(product),
    {KH_FUNCTIONS(gated, float), KH_FUNCTIONS(gated, BFloat16), KH_FUNCTIONS(gated, Half)},
    KH_DTYPES(output),
};

// The functions of losses.h for one level; included by one source file per level, after simd.h, inside its namespace.

// Elements whose largest is found before their exponentials are summed: in float32 8 KiB, which stay in the innermost
// cache, so that memory is passed over once and each element has one exponential.
constexpr int64_t BLOCK = 2048;

// The elements from i on, `count` of them, `fill` behind them.
template <typename T>
KH_INLINE V get(const void* row, int64_t i, int64_t count, float fill) {
  const T* p = static_cast<const T*>(row) + i;
  if (count == L) {
    return load(p);
  }
  alignas(64) float lanes[L];
  store(lanes, load_some(p, count));
  for (int64_t lane = count; lane < L; ++lane) {
    lanes[lane] = fill;
  }
  return load(lanes);
}
template <typename T>
KH_INLINE void put(void* row, int64_t i, int64_t count, V v) {
  T* p = static_cast<T*>(row) + i;
  count == L ? store(p, v) : store_some(p, v, count);
}

// `each(k, i, count)` for the elements from begin to end: 4 * L at a time, to k = 0 to 3; then L; then the tail.
template <typename Each>
KH_INLINE void for_each(int64_t begin, int64_t end, const Each& each) {
  int64_t i = begin;
  for (; i + 4 * L <= end; i += 4 * L) {
    for (int k = 0; k < 4; ++k) {
      each(k, i + k * L, int64_t{L});
    }
  }
  for (; i + L <= end; i += L) {
    each(0, i, int64_t{L});
  }
  if (i < end) {
    each(1, i, end - i);
  }
}

KH_INLINE double sum_of(const V (&sums)[4]) {
  alignas(64) float lanes[L];
  store(lanes, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  double total = 0.0;
  for (int lane = 0; lane < L; ++lane) {
    total += lanes[lane];
  }
  return total;
}

KH_INLINE float first_of(V v) {
  alignas(64) float lanes[L];
  store(lanes, v);
  return lanes[0];
}

// The largest element; NaNs are passed over, they show in the sum.
template <typename T>
KH_INLINE float most_of(const void* x, int64_t begin, int64_t end) {
  const V least = set(-__builtin_inff());
  V most[4] = {least, least, least, least};
  for_each(begin, end, [&](int k, int64_t i, int64_t count) KH_LAMBDA {
    const V v = get<T>(x, i, count, -__builtin_inff());
    most[k] = if_less(most[k], v, v, most[k]);
  });
  for (int k = 1; k < 4; ++k) {
    most[0] = if_less(most[0], most[k], most[k], most[0]);
  }
  alignas(64) float lanes[L];
  store(lanes, most[0]);
  float found = lanes[0];
  for (int lane = 1; lane < L; ++lane) {
    found = lanes[lane] > found ? lanes[lane] : found;
  }
  return found;
}

template <typename T, bool WITH_PLAIN>
Sums sums(const void* x, int64_t n) {
  const float least = -__builtin_inff();
  Sums of{least, 0.0, 0.0};
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    const int64_t end = begin + BLOCK < n ? begin + BLOCK : n;
    const float found = most_of<T>(x, begin, end);
    if (found > of.most) {
      if (WITH_PLAIN && begin > 0) {
        of.plain += (static_cast<double>(of.most) - found) * static_cast<double>(begin);
      }
      of.total *= first_of(exponential(set(of.most - found)));
      of.most = found;
    }
    // As long as there is nothing but -inf, exp(-inf - 0) is the 0 that is meant, and a NaN stays one.
    const float held = of.most == least ? 0.0f : of.most;
    const V shift = set(held);
    V totals[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
    for_each(begin, end, [&](int k, int64_t i, int64_t count) KH_LAMBDA {
      totals[k] = totals[k] + exponential(get<T>(x, i, count, least) - shift);
    });
    of.total += sum_of(totals);
    if constexpr (WITH_PLAIN) {
      V plain[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
      for_each(begin, end, [&](int k, int64_t i, int64_t count) KH_LAMBDA {
        plain[k] = plain[k] + (get<T>(x, i, count, held) - shift);
      });
      of.plain += sum_of(plain);
    }
  }
  return of;
}

template <typename T>
void gradient(const GradientRow& row) {
  const V most = set(row.most), factor = set(row.scale * row.inverse), less = set(row.less);
  // Before its logit is written over, where that happens in place.
  const V label = get<T>(row.x, row.label, 1, 0.0f);
  for_each(0, row.n, [&](int, int64_t i, int64_t count) KH_LAMBDA {
    put<T>(row.grad, i, count, exponential(get<T>(row.x, i, count, 0.0f) - most) * factor - less);
  });
  const V above = exponential(label - most) * set(row.inverse) - set(row.more);
  store_some(static_cast<T*>(row.grad) + row.label, above * set(row.scale) - less, 1);
}

#define KH_SUMS(T) {sums<T, false>, sums<T, true>}

const Losses losses = {
    {KH_SUMS(float), KH_SUMS(BFloat16), KH_SUMS(Half)},
    {gradient<float>, gradient<BFloat16>, gradient<Half>},
};

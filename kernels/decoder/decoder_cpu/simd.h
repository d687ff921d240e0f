// A vector of floats: as wide as the instructions of the level that this file is included for.
//
// Included by one source file per level, inside its namespace, with KERNELHUB_LEVEL set and the level's instructions
// allowed. `V` is L floats; loads widen bfloat16 and float16, stores round to nearest, ties to even. The build does not
// contract a * b + c (-ffp-contract=off): where a fused multiply-add is meant, `fma` is written.

#define KH_INLINE static inline __attribute__((always_inline))
#define KH_LAMBDA __attribute__((always_inline))
#define KH_NO_INLINE static __attribute__((noinline, unused))

#if KERNELHUB_LEVEL == 0
#define KH_MATH KH_NO_INLINE // for the sake of the code's size and the time that compiling it takes
#else
#define KH_MATH KH_INLINE
#endif

#if KERNELHUB_LEVEL == 2

typedef __m512 V;
constexpr int L = 16;

KH_INLINE V set(float x) { return _mm512_set1_ps(x); }
KH_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
KH_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
// In one instruction each: 16 bits to every second place, and back. The element that comes first is the last argument.
KH_INLINE V load(const BFloat16* p) {
  const __m512i to_upper = _mm512_set_epi16(
      15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i narrow = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, to_upper, narrow));
}
// The upper halves of the results are the rounded values, the lower ones are of no meaning.
KH_INLINE __m512i upper_rounded(V v) {
  const __m512i bits = _mm512_castps_si512(v), more = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i rounded = _mm512_mask_add_epi32(more, odd, more, _mm512_set1_epi32(1));
  // NaNs of both kinds (the two lowest digits of the table) become v's own, made quiet (2); all else stays (0).
  const __m512i table = _mm512_set1_epi32(0x22);
  return _mm512_castps_si512(_mm512_fixupimm_ps(_mm512_castsi512_ps(rounded), v, table, 0));
}
KH_INLINE void store(BFloat16* p, V v) {
  const __m512i upper = _mm512_set_epi16(
      31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const __m512i packed = _mm512_permutexvar_epi16(upper, upper_rounded(v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(packed));
}
KH_INLINE V rounded_as(BFloat16, V v) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
  return _mm512_castsi512_ps(_mm512_and_si512(upper_rounded(v), mask));
}
KH_INLINE V load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
KH_INLINE void store(Half* p, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
KH_INLINE V rounded_as(Half, V v) { return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
KH_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
KH_INLINE V absolute(V v) { return _mm512_abs_ps(v); }
// The sign of `sign` on the size of `size`.
KH_INLINE V with_sign(V size, V sign) {
  const __m512i mask = _mm512_set1_epi32(INT32_MIN);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(mask, _mm512_castps_si512(sign), _mm512_castps_si512(size), 0xca));
}
// a < b ? yes : no, lane by lane; a NaN is not less than anything.
KH_INLINE V if_less(V a, V b, V yes, V no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
// v held to what lies between -most and most; NaNs are kept.
KH_INLINE V held(V v, float most) { return _mm512_min_ps(set(most), _mm512_max_ps(set(-most), v)); }
KH_INLINE V nearest(V v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// v * 2**q for whole q.
KH_INLINE V times_power_of_two(V v, V q) { return _mm512_scalef_ps(v, q); }

#elif KERNELHUB_LEVEL == 1

typedef __m256 V;
constexpr int L = 8;

KH_INLINE V set(float x) { return _mm256_set1_ps(x); }
KH_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
KH_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
KH_INLINE V load(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
KH_INLINE __m256i upper_rounded(V v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
}
KH_INLINE V rounded_as(BFloat16, V v) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
  return _mm256_castsi256_ps(_mm256_and_si256(upper_rounded(v), mask));
}
KH_INLINE void store(BFloat16* p, V v) {
  const __m256i high = _mm256_srli_epi32(upper_rounded(v), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
KH_INLINE V load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
KH_INLINE void store(Half* p, V v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
KH_INLINE V rounded_as(Half, V v) { return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
KH_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
KH_INLINE V absolute(V v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
KH_INLINE V with_sign(V size, V sign) {
  return _mm256_or_ps(absolute(size), _mm256_and_ps(_mm256_set1_ps(-0.0f), sign));
}
KH_INLINE V if_less(V a, V b, V yes, V no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
KH_INLINE V held(V v, float most) { return _mm256_min_ps(set(most), _mm256_max_ps(set(-most), v)); }
KH_INLINE V nearest(V v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// For |q| up to 250, in two steps, so that no factor overflows where the product does not.
KH_INLINE V times_power_of_two(V v, V q) {
  const __m256i whole = _mm256_cvtps_epi32(q), half = _mm256_srai_epi32(whole, 1);
  const __m256i rest = _mm256_sub_epi32(whole, half), bias = _mm256_set1_epi32(127);
  const V first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const V second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return v * first * second;
}

#else

typedef float V __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint16_t Narrow __attribute__((vector_size(8)));
constexpr int L = 4;

template <typename To, typename From>
KH_INLINE To same_bits(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

KH_INLINE V choose(I mask, V yes, V no) {
  return same_bits<V>((same_bits<I>(yes) & mask) | (same_bits<I>(no) & ~mask));
}
KH_INLINE V set(float x) { return V{x, x, x, x}; }
KH_INLINE V load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
KH_INLINE void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof(V)); }
KH_INLINE V load(const BFloat16* p) {
  Narrow bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return same_bits<V>(__builtin_convertvector(bits, U) << 16);
}
KH_INLINE void store(BFloat16* p, V v) {
  const U bits = same_bits<U>(v), nan = (U)(v != v);
  const U kept = ((bits + 0x7fffu + (bits >> 16 & 1)) & ~nan) | (nan & 0x7fc00000u);
  const Narrow high = __builtin_convertvector(kept >> 16, Narrow);
  __builtin_memcpy(p, &high, sizeof(high));
}
KH_NO_INLINE V load(const Half* p) {
  Narrow half;
  __builtin_memcpy(&half, p, sizeof(half));
  const U bits = __builtin_convertvector(half, U), sign = (bits & 0x8000u) << 16, size = bits & 0x7fffu;
  // Below 2**-14 the bits are a multiple of 2**-24; from 31 << 10 on they are of infinity and NaNs.
  const V small = __builtin_convertvector((I)size, V) * 0x1p-24f;
  const U normal = (size << 13) + (112u << 23), special = (size << 13) | 0x7f800000u;
  const U is_small = (U)(size < 0x0400u), is_special = (U)(size >= 0x7c00u);
  const U found = (same_bits<U>(small) & is_small) | (special & is_special) | (normal & ~(is_small | is_special));
  return same_bits<V>(found | sign);
}
KH_NO_INLINE void store(Half* p, V v) {
  const U all = same_bits<U>(v), sign = all >> 16 & 0x8000u, size = all & 0x7fffffffu;
  // Adding 0.5 leaves the multiple of 2**-24 in the last bits, rounded by the processor.
  const U small = same_bits<U>(same_bits<V>(size) + 0.5f) - 0x3f000000u;
  const U normal = (size - (112u << 23) + 0x0fffu + (size >> 13 & 1)) >> 13;
  const U is_small = (U)(size < 0x38800000u), is_huge = (U)(size >= 0x47800000u), is_nan = (U)(size > 0x7f800000u);
  const U finite = (small & is_small) | (normal & ~is_small);
  const U bits = (finite & ~is_huge) | (0x7c00u & is_huge) | (0x0200u & is_nan) | sign;
  const Narrow half = __builtin_convertvector(bits, Narrow);
  __builtin_memcpy(p, &half, sizeof(half));
}
template <typename T>
KH_INLINE V rounded_as(T, V v) {
  T narrow_ones[L];
  store(narrow_ones, v);
  return load(narrow_ones);
}
// Where the processor has no such instruction, a library function would be 50 times as slow as two roundings.
KH_INLINE V fma(V a, V b, V c) {
#if defined(__FP_FAST_FMAF)
  for (int lane = 0; lane < L; ++lane) {
    c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  }
  return c;
#else
  return a * b + c;
#endif
}
KH_INLINE V absolute(V v) { return same_bits<V>(same_bits<U>(v) & 0x7fffffffu); }
KH_INLINE V with_sign(V size, V sign) {
  return same_bits<V>((same_bits<U>(size) & 0x7fffffffu) | (same_bits<U>(sign) & 0x80000000u));
}
KH_INLINE V if_less(V a, V b, V yes, V no) { return choose(a < b, yes, no); }
KH_INLINE V held(V v, float most) {
  return if_less(set(most), v, set(most), if_less(v, set(-most), set(-most), v));
}
KH_INLINE V nearest(V v) {
  // From 2**23 on floats are whole; below, adding and taking away 2**23 rounds to whole.
  const V size = absolute(v), whole = (size + 0x1p23f) - 0x1p23f;
  return with_sign(choose(size < 0x1p23f, whole, size), v);
}
KH_INLINE V times_power_of_two(V v, V q) {
  const V known = choose(q == q, q, set(0.0f)); // of a NaN, a whole number would be undefined
  const I whole = __builtin_convertvector(known, I), half = whole >> 1;
  return v * same_bits<V>((half + 127) << 23) * same_bits<V>((whole - half + 127) << 23);
}

#endif

// The first `count` elements, zeros behind them.
template <typename T>
KH_NO_INLINE V load_some(const T* p, int64_t count) {
  T padded[L] = {};
  __builtin_memcpy(padded, p, count * sizeof(T));
  return load(padded);
}
template <typename T>
KH_NO_INLINE void store_some(T* p, V v, int64_t count) {
  T padded[L];
  store(padded, v);
  __builtin_memcpy(p, padded, count * sizeof(T));
}

// What is left of v after it was written as a T and read again.
template <typename T>
KH_INLINE V rounded(V v) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return v;
  } else {
    return rounded_as(T{}, v);
  }
}

// e**x, at most 1 ulp off. The constants (log2(e), ln 2 in two parts, the polynomial) are those of SLEEF, which ATen uses,
// in the same order: models' gates then come out bit for bit as PyTorch's. Beyond what x is held to, it is 0 or infinite.
KH_MATH V exponential(V given) {
  const V x = held(given, 105.0f);
  const V q = nearest(x * set(1.442695040888963407359924681001892137f));
  V s = fma(q, set(-0.693145751953125f), x);
  s = fma(q, set(-1.428606765330187045e-06f), s);
  V u = set(0.000198527617612853646278381f);
  u = fma(u, s, set(0.00139304355252534151077271f));
  u = fma(u, s, set(0.00833336077630519866943359f));
  u = fma(u, s, set(0.0416664853692054748535156f));
  u = fma(u, s, set(0.166666671633720397949219f));
  u = fma(u, s, set(0.5f));
  u = set(1.0f) + fma(s * s, u, s);
  return times_power_of_two(u, q);
}
KH_INLINE V sigmoid(V x) { return set(1.0f) / (set(1.0f) + exponential(set(0.0f) - x)); }
// The sigmoid and its derivative, without the cancellation of 1 - sigmoid(x).
struct Logistic {
  V value, slope;
};
KH_INLINE Logistic logistic(V x) {
  const V e = exponential(-absolute(x)), more = set(1.0f) / (set(1.0f) + e), less = e * more;
  return {if_less(x, set(0.0f), less, more), more * less};
}
// As ATen computes it: not x * sigmoid(x), which rounds once more.
KH_INLINE V silu(V x) { return x / (set(1.0f) + exponential(-x)); }

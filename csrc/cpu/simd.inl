// Vectors of float and double, as wide as the instruction set (FASTGAN_ISA: 0 baseline, 2 AVX2, 512 AVX-512). Included by
// simd.h inside one namespace per instruction set. Arithmetic is written with operators, which GCC and Clang turn into
// vector instructions of any machine; the few functions with intrinsics are those that operators can't express.

#if FASTGAN_ISA == 512
constexpr int kVectorBytes = 64;
#elif FASTGAN_ISA == 2
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int32Vector __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64Vector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UInt32Vector __attribute__((vector_size(kVectorBytes)));  // adds modulo 2^32

template <class T> struct VectorOf;
template <> struct VectorOf<float> { using Type = FloatVector; using Bits = Int32Vector; using Lane = int32_t; };
template <> struct VectorOf<double> { using Type = DoubleVector; using Bits = Int64Vector; using Lane = int64_t; };
template <class T> using Vector = typename VectorOf<T>::Type;
template <class T> using Bits = typename VectorOf<T>::Bits;
template <class T> constexpr int kLanes = kVectorBytes / sizeof(T);

template <class T> FASTGAN_INLINE Vector<T> load(const T* p) {
  Vector<T> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

template <class T> FASTGAN_INLINE void store(T* p, Vector<T> x) { std::memcpy(p, &x, sizeof x); }

template <class T> FASTGAN_INLINE Vector<T> broadcast(T x) { return x - Vector<T>{}; }

FASTGAN_INLINE Int32Vector broadcast_bits(int32_t x) { return x - Int32Vector{}; }
FASTGAN_INLINE Int64Vector broadcast_bits(int64_t x) { return x - Int64Vector{}; }

FASTGAN_INLINE Int32Vector bits(FloatVector x) { return (Int32Vector)x; }
FASTGAN_INLINE Int64Vector bits(DoubleVector x) { return (Int64Vector)x; }
FASTGAN_INLINE FloatVector from_bits(Int32Vector x) { return (FloatVector)x; }
FASTGAN_INLINE DoubleVector from_bits(Int64Vector x) { return (DoubleVector)x; }

FASTGAN_INLINE FloatVector absolute(FloatVector x) { return from_bits(bits(x) & broadcast_bits(INT32_MAX)); }
FASTGAN_INLINE DoubleVector absolute(DoubleVector x) { return from_bits(bits(x) & broadcast_bits(INT64_MAX)); }

// x where the mask's bits are set, 0 elsewhere, be x NaN or not.
FASTGAN_INLINE FloatVector keep(FloatVector x, Int32Vector mask) { return from_bits(bits(x) & mask); }
FASTGAN_INLINE DoubleVector keep(DoubleVector x, Int64Vector mask) { return from_bits(bits(x) & mask); }

// Lanes below count.
template <class T> FASTGAN_INLINE Bits<T> first_lanes(int64_t count) {
  Bits<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < broadcast_bits(typename VectorOf<T>::Lane(count));
}

// a - b. On AVX2 as 1 * a - b, which runs on the multipliers and leaves the adders to the sums that differences go into.
FASTGAN_INLINE FloatVector difference(FloatVector a, FloatVector b) {
#if FASTGAN_ISA == 2
  __m256 one = _mm256_set1_ps(1);
  asm("" : "+x"(one));  // else the compiler sees through it
  return (FloatVector)_mm256_fmsub_ps((__m256)a, one, (__m256)b);
#else
  return a - b;
#endif
}
FASTGAN_INLINE DoubleVector difference(DoubleVector a, DoubleVector b) { return a - b; }

// x, which the compiler doesn't look through: it neither fuses a product with what it goes into nor folds a constant.
template <class V> FASTGAN_INLINE V opaque(V x) {
#if FASTGAN_ISA >= 2
  asm("" : "+x"(x));
#endif
  return x;
}

// min(x, limit), NaN where x is NaN.
FASTGAN_INLINE FloatVector at_most(FloatVector x, float limit) {
#if FASTGAN_ISA == 512
  return (FloatVector)_mm512_maskz_min_ps(__mmask16(-1), (__m512)broadcast(limit), (__m512)x);
#elif FASTGAN_ISA == 2
  return (FloatVector)_mm256_min_ps((__m256)broadcast(limit), (__m256)x);
#else
  const Int32Vector above = x > broadcast(limit);
  return from_bits((bits(broadcast(limit)) & above) | (bits(x) & ~above));
#endif
}
FASTGAN_INLINE DoubleVector at_most(DoubleVector x, double limit) {
#if FASTGAN_ISA == 512
  return (DoubleVector)_mm512_maskz_min_pd(__mmask8(-1), (__m512d)broadcast(limit), (__m512d)x);
#elif FASTGAN_ISA == 2
  return (DoubleVector)_mm256_min_pd((__m256d)broadcast(limit), (__m256d)x);
#else
  const Int64Vector above = x > broadcast(limit);
  return from_bits((bits(broadcast(limit)) & above) | (bits(x) & ~above));
#endif
}

FASTGAN_INLINE FloatVector square_root(FloatVector x) {
#if FASTGAN_ISA == 512
  return (FloatVector)_mm512_maskz_sqrt_ps(__mmask16(-1), (__m512)x);
#elif FASTGAN_ISA == 2
  return (FloatVector)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
FASTGAN_INLINE DoubleVector square_root(DoubleVector x) {
#if FASTGAN_ISA == 512
  return (DoubleVector)_mm512_maskz_sqrt_pd(__mmask8(-1), (__m512d)x);
#elif FASTGAN_ISA == 2
  return (DoubleVector)_mm256_sqrt_pd((__m256d)x);
#else
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

// The larger of a and b, lane by lane. Baseline x86-64 lacks the instruction.
FASTGAN_INLINE UInt32Vector larger(UInt32Vector a, UInt32Vector b) {
#if FASTGAN_ISA == 512
  return (UInt32Vector)_mm512_maskz_max_epu32(__mmask16(-1), (__m512i)a, (__m512i)b);
#elif FASTGAN_ISA == 2
  return (UInt32Vector)_mm256_max_epu32((__m256i)a, (__m256i)b);
#else
  const UInt32Vector above = (UInt32Vector)(a > b);
  return (a & above) | (b & ~above);
#endif
}

// sign(x) * kSign<T>: 0 for +0, and any of -1, 0, 1 times kSign for NaN. -0 doesn't count as 0.
// AVX2 has an integer sign transfer, and 2.0f is the one float whose bits, negated as an integer, are those of -2.0f.
template <class T> constexpr T kSign = 1;
#if FASTGAN_ISA == 2
template <> constexpr float kSign<float> = 2;
#endif
FASTGAN_INLINE FloatVector scaled_sign(FloatVector x) {
#if FASTGAN_ISA == 512
  // Classes, from the lowest hex digit: quiet NaN, signalling NaN, zero, +1, -inf, +inf, negative, positive.
  // Answers: 8 is +0, 9 is -1, a is +1.
  return (FloatVector)_mm512_fixupimm_ps((__m512)x, (__m512)x, _mm512_set1_epi32(int(0xa9a9a888u)), 0);
#elif FASTGAN_ISA == 2
  return (FloatVector)_mm256_sign_epi32((__m256i)broadcast(2.0f), (__m256i)x);
#else
  return from_bits(((bits(x) & broadcast_bits(INT32_MIN)) | bits(broadcast(1.0f))) & (x != FloatVector{}));
#endif
}
FASTGAN_INLINE DoubleVector scaled_sign(DoubleVector x) {
#if FASTGAN_ISA == 512
  return (DoubleVector)_mm512_fixupimm_pd((__m512d)x, (__m512d)x, _mm512_set1_epi64(0xa9a9a888ll), 0);
#else
  return from_bits(((bits(x) & broadcast_bits(INT64_MIN)) | bits(broadcast(1.0))) & (x != DoubleVector{}));
#endif
}

// Vectors of float out of, and into, memory of any type; numbers of 16 bits are rounded to nearest, as torch does.
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

FASTGAN_INLINE FloatVector load_wide(const float* p) { return load(p); }
FASTGAN_INLINE DoubleVector load_wide(const double* p) { return load(p); }
FASTGAN_INLINE FloatVector load_wide(const BFloat16* p) {
  HalfWords words;
  std::memcpy(&words, p, sizeof words);
  return (FloatVector)(__builtin_convertvector(words, Words) << 16);
}
FASTGAN_INLINE FloatVector load_wide(const Half* p) {
#if FASTGAN_ISA == 512
  return (FloatVector)_mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256((const __m256i*)p));
#elif FASTGAN_ISA == 2
  return (FloatVector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  FloatVector x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = p[i];
  return x;
#endif
}

FASTGAN_INLINE void store_narrow(float* p, FloatVector x) { store(p, x); }
FASTGAN_INLINE void store_narrow(double* p, DoubleVector x) { store(p, x); }
FASTGAN_INLINE void store_narrow(BFloat16* p, FloatVector x) {
  const Words b = (Words)x, nan = (Words)(x != x);
  const Words rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  const HalfWords words = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), HalfWords);
  std::memcpy(p, &words, sizeof words);
}
FASTGAN_INLINE void store_narrow(Half* p, FloatVector x) {
#if FASTGAN_ISA == 512
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(__mmask16(-1), (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif FASTGAN_ISA == 2
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = x[i];
#endif
}

// Past the caches: what is written this way isn't read into them first. The address has to be aligned, and end_of_stream
// has to be called before another thread reads.
FASTGAN_INLINE void stream(float* p, FloatVector x) {
#if FASTGAN_ISA == 512
  _mm512_stream_ps(p, (__m512)x);
#elif FASTGAN_ISA == 2
  _mm256_stream_ps(p, (__m256)x);
#else
  store(p, x);
#endif
}
FASTGAN_INLINE void stream(double* p, DoubleVector x) {
#if FASTGAN_ISA == 512
  _mm512_stream_pd(p, (__m512d)x);
#elif FASTGAN_ISA == 2
  _mm256_stream_pd(p, (__m256d)x);
#else
  store(p, x);
#endif
}

FASTGAN_INLINE bool aligned(const void* p) { return (uintptr_t)p % kVectorBytes == 0; }

static inline void end_of_stream() {
#if FASTGAN_ISA != 0
  _mm_sfence();
#endif
}

// The sum of the lanes of x.
template <class T> FASTGAN_INLINE T sum(Vector<T> x) {
  T lanes[kLanes<T>];
  store(lanes, x);
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// As many floats as a vector holds doubles, in double. GCC would convert what it loads in halves.
FASTGAN_INLINE DoubleVector in_double(const float* p) {
#if FASTGAN_ISA == 512
  return (DoubleVector)_mm512_maskz_cvtps_pd(__mmask8(-1), _mm256_loadu_ps(p));
#elif FASTGAN_ISA == 2
  return (DoubleVector)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  return DoubleVector{p[0], p[1]};
#endif
}

// The sum of squares, in double: those of a float overflow and underflow too early.
typedef float HalfAsManyFloats __attribute__((vector_size(kVectorBytes / 2)));
FASTGAN_INLINE void add_squares(DoubleVector (&sums)[2], DoubleVector x) { sums[0] += x * x; }
FASTGAN_INLINE void add_squares(DoubleVector (&sums)[2], FloatVector x) {
  HalfAsManyFloats halves[2];
  std::memcpy(halves, &x, sizeof x);
  for (int half = 0; half < 2; ++half) {
    const DoubleVector wide = __builtin_convertvector(halves[half], DoubleVector);
    sums[half] += wide * wide;
  }
}
template <class S> double squares(const S* x, int64_t count) {
  constexpr int N = sizeof(S) == 8 ? kLanes<double> : kLanes<float>, chains = 4;
  DoubleVector sums[chains][2] = {};
  int64_t i = 0;
  for (; i + chains * N <= count; i += chains * N)
#pragma GCC unroll 4
    for (int k = 0; k < chains; ++k) add_squares(sums[k], load_wide(x + i + k * N));
  for (; i + N <= count; i += N) add_squares(sums[0], load_wide(x + i));
  if (i < count) {
    S rest[N] = {};
    std::memcpy(rest, x + i, (count - i) * sizeof(S));
    add_squares(sums[1], load_wide(rest));
  }
  DoubleVector total = {};
  for (int k = 0; k < chains; ++k) total += sums[k][0] + sums[k][1];
  return sum<double>(total);
}

// totals[i] += the sum of the lanes of x[i], for each i.
template <class T, int count> FASTGAN_INLINE void add_lane_sums(const Vector<T> (&x)[count], double* totals) {
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) {
    Vector<T> v = x[i];
    T sum = 0;
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes<T>; ++lane) sum += v[lane];
    totals[i] += sum;
  }
}
#if FASTGAN_ISA >= 2
FASTGAN_INLINE void add_lane_sums(__m256 a, __m256 b, __m256 c, __m256 d, double* totals) {
  const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  _mm256_storeu_pd(totals, _mm256_add_pd(_mm256_loadu_pd(totals), _mm256_cvtps_pd(sums)));
}
FASTGAN_INLINE void add_lane_sums(__m256d a, __m256d b, __m256d c, __m256d d, double* totals) {
  const __m256d x = _mm256_hadd_pd(a, b), y = _mm256_hadd_pd(c, d);
  const __m256d sums = _mm256_add_pd(_mm256_permute2f128_pd(x, y, 0x20), _mm256_permute2f128_pd(x, y, 0x31));
  _mm256_storeu_pd(totals, _mm256_add_pd(_mm256_loadu_pd(totals), sums));
}
// Upper half onto lower half where there are two, else as it is.
FASTGAN_INLINE __m256 fold(FloatVector x) {
  __m256 halves[kVectorBytes / 32];
  std::memcpy(halves, &x, sizeof x);
  return kVectorBytes == 64 ? _mm256_add_ps(halves[0], halves[kVectorBytes / 64]) : halves[0];
}
FASTGAN_INLINE __m256d fold(DoubleVector x) {
  __m256d halves[kVectorBytes / 32];
  std::memcpy(halves, &x, sizeof x);
  return kVectorBytes == 64 ? _mm256_add_pd(halves[0], halves[kVectorBytes / 64]) : halves[0];
}
template <> inline __attribute__((always_inline)) void add_lane_sums<float, 4>(const FloatVector (&x)[4], double* totals) {
  add_lane_sums(fold(x[0]), fold(x[1]), fold(x[2]), fold(x[3]), totals);
}
template <> inline __attribute__((always_inline)) void add_lane_sums<double, 4>(const DoubleVector (&x)[4], double* totals) {
  add_lane_sums(fold(x[0]), fold(x[1]), fold(x[2]), fold(x[3]), totals);
}
#endif

// exp(-x) for x >= 0, to 1 ulp or so; exactly 1 at 0, exactly 0 where the result would be subnormal, NaN for NaN.
//
// exp(-x) = 2^n exp(-r), n = round(-x / ln 2), |r| <= ln(2) / 2. Adding 1.5 * 2^23 (2^52) rounds to an integer, and as
// the exponent's bias is added with it the lowest bits of the sum are the exponent of 2^n: 0, which reads as the number
// 0, where x is at its limit. Without fused multiply-add the two parts of ln 2 keep n * ln 2 exact enough.
FASTGAN_INLINE FloatVector exp_minus(FloatVector x) {
  x = at_most(x, 88);
  const FloatVector shifted = x * -1.44269504f + 12583039.0f;
  const FloatVector n = shifted - 12583039.0f;
#if FASTGAN_ISA == 0
  const FloatVector r = (n * 0.693359375f + x) + n * -2.12194440e-4f;
#else
  const FloatVector r = n * 0.693147181f + x;
#endif
  FloatVector e = r * 0.0013843639f - 0.0083741650f;
  e = e * r + 0.0416680028f;
  e = e * r - 0.1666643115f;
  e = e * r + 0.4999999420f;
  e = e * r - 1.0000000322f;
  e = e * r + 1.0f;
  return e * from_bits(bits(shifted) << 23);
}
FASTGAN_INLINE DoubleVector exp_minus(DoubleVector x) {
  x = at_most(x, 709.0);
  const DoubleVector shifted = x * -1.4426950408889634 + 6755399441056767.0;
  const DoubleVector n = shifted - 6755399441056767.0;
  const DoubleVector r = (n * 0.693147180369123816490 + x) + n * 1.90821492927058770002e-10;
  DoubleVector e = r * -2.4991408443696803114e-8 + 2.7631049497507795811e-7;
  e = e * r - 2.755762686238173732e-6;
  e = e * r + 2.4801490595603364218e-5;
  e = e * r - 1.9841269436400399005e-4;
  e = e * r + 1.3888888946389640735e-3;
  e = e * r - 8.3333333335498954345e-3;
  e = e * r + 4.1666666666517698342e-2;
  e = e * r - 0.16666666666666216706;
  e = e * r + 0.50000000000000125079;
  e = e * r - 1.0;
  e = e * r + 1.0;
  return e * from_bits(bits(shifted) << 52);
}

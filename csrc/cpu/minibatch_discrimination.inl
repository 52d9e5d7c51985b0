// The pairs of one kernel k, per instruction set. fastgan/ops/minibatch_discrimination.py has the mathematics.
//
// Every operator is one or two sweeps over the pairs i < j, each pair serving both its samples:
//     values   e_ij, times p_ij where there is a tangent, summed per sample          (symmetric in i and j)
//     weights  (g_i + g_j) e_ij, times p_ij, times sign(m_jd - m_id) summed per sample and coordinate   (antisymmetric)
//
// Samples come in blocks of kRows. A pair of blocks is worked on in tiles of kTile samples i against whole vectors of
// samples j; sums over a pair of blocks are kept in T, short enough to be accurate, and added to totals in double. The
// vector of j that holds the tile's own samples is computed in full for the j side, every ordered pair once; the self
// pair in it contributes 0 or, for samples that aren't finite, the NaN that the specification has there.

template <class T> constexpr int kTile = kLanes<T> < 4 ? kLanes<T> : 4;

// Distances in fixed point. |a - b| = 2 max(a, b) - a - b, and of a sum of it over coordinates only max and addition are left
// to do per pair: 2 instructions a coordinate instead of 3, on integers, which more of a processor's units work on than on
// floats. In floats the identity would lose digits; in integers it is exact. Coordinates are written as multiples of a quantum
// above the smallest one. The quantum is ln(2) 2^-s: the bits of a distance in quanta, from s on, are then the exponent of
// exp(-distance), with neither a conversion nor a product. s is as large as it may be without a distance exceeding 2^32 quanta
// or a coordinate 2^31. What the quantum rounds off a distance is sqrt(D / 6) quanta in the root mean square; samples that
// spread so far that it would exceed kRoundOff, a quarter of the rounding of a float near 1 (or that aren't finite) keep their
// floats.
constexpr bool kFixedPoint = FASTGAN_ISA >= 2;
constexpr double kRoundOff = 1.0 / (1 << 25);
constexpr int kMantissa = 23;

// s - kMantissa for samples that spread so far in all coordinates together and in the widest, in units of ln(2); 0: too far.
static inline int fixed_point_shift(double spread, double widest, int64_t D) {
  constexpr double most = 4294967295.0, unit = 0.6931471805599453;
  if (!(spread <= 124)) return 0;  // the least exp(-distance) is a normal number
  for (int shift = 8; shift > 0; --shift) {
    const double scale = double(int64_t(1) << (shift + kMantissa));
    if (spread * scale + scale / 2 + 2 * D <= most && widest * scale <= most / 2 - 2)
      return unit / scale * std::sqrt(D / 6.0) <= kRoundOff ? shift : 0;
  }
  return 0;
}

// The packed blocks' coordinates in fixed point: doubled in the rows from fixed_row on, and minus their sum, not doubled, in
// the row after them, with half of what rounds a distance to the bits that exp_minus_of_fixed_point takes. Returns s - kMantissa,
// or 0 where the samples spread too far. lowest holds D values in between.
template <Operator op> FASTGAN_INLINE int to_fixed_point(float* packed, float* lowest, int64_t B, int64_t D) {
  using Flags = Layout<op>;
  using V = FloatVector;
  typedef int32_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
  constexpr int N = kLanes<float>;
  constexpr int64_t stride = kStride<float>;
  const int64_t block_size = Flags::packed_rows(D) * stride;
  double spread = 0, widest = 0;
  for (int64_t d = 0; d < D; ++d) {
    V low = load(packed + d * stride), high = low, not_finite = {};
    const float* x = packed + d * stride;
    for (int64_t b = 0; b < B; b += kRows, x += block_size)
      for (int64_t r = 0; r < kRows && b + r < B; r += N) {
        const V value = load(x + r);
        low = value < low ? value : low;
        high = value > high ? value : high;
        not_finite += value - value;
      }
    float smallest = low[0], largest = high[0];
    for (int lane = 1; lane < N; ++lane) {
      smallest = low[lane] < smallest ? low[lane] : smallest;
      largest = high[lane] > largest ? high[lane] : largest;
    }
    lowest[d] = smallest;
    const double range = (double(largest) - double(smallest)) * 1.4426950408889634;
    spread += range + sum<float>(not_finite);
    widest = range > widest ? range : widest;
  }
  const int shift = fixed_point_shift(spread, widest, D);
  if (shift == 0) return 0;
  const double scale = double(int64_t(1) << (shift + kMantissa)) * 1.4426950408889634;
  const int32_t half = (1 << (shift + kMantissa - 2)) + (1 << shift >> 2);
  for (int64_t b = 0; b < B; b += kRows, packed += block_size) {
    float* sums = packed + (Flags::fixed_row(D) + D) * stride;
    for (int64_t r = 0; r < kRows && b + r < B; r += N) store(sums + r, from_bits(broadcast_bits(half)));
    for (int64_t d = 0; d < D; ++d) {
      const DoubleVector offset = broadcast(0.5 - lowest[d] * scale);
      for (int64_t r = 0; r < kRows && b + r < B; r += N / 2) {
        HalfBits total;
        std::memcpy(&total, sums + r, sizeof total);
        const HalfBits value = __builtin_convertvector(in_double(packed + d * stride + r) * scale + offset, HalfBits);
        const HalfBits doubled = value << 1;
        total -= value;
        std::memcpy(packed + (Flags::fixed_row(D) + d) * stride + r, &doubled, sizeof doubled);
        std::memcpy(sums + r, &total, sizeof total);
      }
    }
  }
  return shift;
}

// The two blocks of a pair: i < j, or the same one.
template <class T> struct BlockPair {
  const T *i, *j;  // packed
  double* totals_i;
  T* sums_j;  // laid out as totals
  int64_t rows_i, rows_j;
  bool same, self_term;
  int shift;  // of distances in fixed point, or 0 where there are none
};

// Adds coordinates d .. d + count to the distances and p. The distance grows by the sum of the chunk: fewer roundings at
// its full size, and a shorter chain of additions.
template <class T, bool tangent, int I, int J, int count>
FASTGAN_INLINE void add_coordinates(const T* xi, const T* xj, int64_t tangents, Vector<T> (&distance)[I][J],
                                    Vector<T> (&p)[I][J]) {
  using V = Vector<T>;
  constexpr int64_t stride = kStride<T>;
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      V parts[count];
#pragma GCC unroll 8
      for (int c = 0; c < count; ++c) {
        const V delta = difference(load(xj + c * stride + j * kLanes<T>), broadcast(xi[c * stride + i]));
        parts[c] = absolute(delta);
        if constexpr (tangent) {
          const V slope = load(xj + tangents + c * stride + j * kLanes<T>) - broadcast(xi[tangents + c * stride + i]);
          p[i][j] += scaled_sign(delta) * slope;
        }
      }
      if constexpr (count == 4)
        distance[i][j] += (parts[0] + parts[1]) + (parts[2] + parts[3]);
      else
        distance[i][j] += parts[0];
    }
}

template <class T, bool tangent, int I, int J>
FASTGAN_INLINE void pair_values(const T* xi, const T* xj, int64_t D, Vector<T> (&value)[I][J]) {
  constexpr int64_t stride = kStride<T>;
  Vector<T> distance[I][J] = {}, p[I][J] = {};
  int64_t d = 0;
  for (; d + 4 <= D; d += 4) add_coordinates<T, tangent, I, J, 4>(xi + d * stride, xj + d * stride, D * stride, distance, p);
  for (; d < D; ++d) add_coordinates<T, tangent, I, J, 1>(xi + d * stride, xj + d * stride, D * stride, distance, p);
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      value[i][j] = exp_minus(distance[i][j]);
      if constexpr (tangent) value[i][j] *= p[i][j];
    }
}

// exp(-ln(2) x 2^-(shift + 23)) of each x, to 1 ulp or so, exactly 1 for 0. x holds 2^(shift + 22) too much, which makes t lie
// around 0, and half a bit of what the shift drops. 2^-t is a polynomial with the least relative error on [-1/2, 1/2]. One step
// for all of them before the next: in a row they would be too long a chain for a processor to see the next one.
template <int I, int J>
FASTGAN_INLINE void exp_minus_of_fixed_point(UInt32Vector (&x)[I][J], UInt32Vector shift, FloatVector (&e)[I][J]) {
  constexpr float factors[] = {-0.001339887441f, 0.009618437358f, -0.05550332471f, 0.2402264791f, -0.6931472029f, 1};
  FloatVector t[I][J];
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      x[i][j] >>= shift;
      t[i][j] = from_bits((Int32Vector)((x[i][j] & 0x7fffff) | 0x3f800000)) - 1.5f;
      x[i][j] &= 0xff800000;
      e[i][j] = broadcast(0.0001535336191f);
    }
#pragma GCC unroll 8
  for (float factor : factors) {
    const FloatVector f = opaque(broadcast(factor));  // loaded once
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) e[i][j] = e[i][j] * t[i][j] + f;
  }
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) e[i][j] = from_bits(bits(e[i][j]) - (Int32Vector)x[i][j]);
}

template <int I, int J>
FASTGAN_INLINE void pair_values_in_fixed_point(const float* xi, const float* xj, int64_t D, int shift,
                                               FloatVector (&value)[I][J]) {
  constexpr int64_t stride = kStride<float>;
  const auto row_of = [](const float* x, int64_t d) { return (UInt32Vector)load(x + d * stride); };
  const auto one = [](const float* x) {
    uint32_t value;
    std::memcpy(&value, x, sizeof value);
    return value - UInt32Vector{};
  };
  UInt32Vector distance[I][J];
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) distance[i][j] = row_of(xj + j * kLanes<float>, D) + one(xi + D * stride + i);
#pragma GCC unroll 4
  for (int64_t d = 0; d < D; ++d) {
    UInt32Vector x[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) x[j] = row_of(xj + j * kLanes<float>, d);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      const UInt32Vector own = one(xi + d * stride + i);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) distance[i][j] += larger(x[j], own);
    }
  }
  exp_minus_of_fixed_point(distance, opaque(shift - UInt32Vector{}), value);
}

// Samples i0.. against the vectors [first, last) of block j, after the vector diagonal (if any) for the j side alone.
template <class T, Operator op, bool fixed_point> struct Tile {
  using V = Vector<T>;
  using Flags = Layout<op>;
  static constexpr int N = kLanes<T>, I = kTile<T>, J = Flags::tangent ? 1 : 2;
  static constexpr int64_t stride = kStride<T>;

  const BlockPair<T>& block;
  int64_t D, i0;
  T* weights;  // (I, kRows)

  template <int columns> inline __attribute__((always_inline)) void pairs(int64_t c, V (&value)[I][columns]) const {
    if constexpr (fixed_point) {
      const int64_t row = Flags::fixed_row(D) * stride;
      pair_values_in_fixed_point<I, columns>(block.i + row + i0, block.j + row + c * N, D, block.shift, value);
    } else {
      pair_values<T, Flags::tangent, I, columns>(block.i + i0, block.j + c * N, D, value);
    }
  }

  template <int columns>
  inline __attribute__((always_inline)) void finish(V (&value)[I][columns], int64_t c, V* sums_i, const Bits<T>* masks) const {
    const T* gi = block.i + Flags::grad_row(D) * stride + i0;
    const T* gj = block.j + Flags::grad_row(D) * stride;
#pragma GCC unroll 8
    for (int j = 0; j < columns; ++j) {
      V sum_j = {};
      V g = {};
      if constexpr (Flags::weights) g = load(gj + (c + j) * N);
#pragma GCC unroll 8
      for (int i = 0; i < I; ++i) {
        V e = value[i][j];
        if constexpr (Flags::values) {
          const V kept = masks ? keep(e, masks[i]) : e;
          sum_j += kept;
          if (sums_i) sums_i[i] += kept;
        }
        if constexpr (Flags::weights) {
          e *= g + broadcast(gi[i]);
          store(weights + i * kRows + (c + j) * N, masks ? keep(e, masks[i]) : e);
        }
      }
      if constexpr (Flags::values) {
        T* out = block.sums_j + Flags::value_row(D) * stride + (c + j) * N;
        store(out, load(out) + sum_j);
      }
    }
  }

  void values(int64_t diagonal, int64_t first, int64_t last) const {
    V sums_i[I] = {};
    const int64_t full = block.rows_j / N;
    if (diagonal >= 0) {
      Bits<T> masks[I];
      for (int i = 0; i < I; ++i) {
        masks[i] = first_lanes<T>(i0 + i < block.rows_i ? block.rows_j - diagonal * N : 0);
        if (op == Operator::forward && !block.self_term) masks[i][i0 + i - diagonal * N] = 0;
      }
      V value[I][1];
      pairs<1>(diagonal, value);
      finish<1>(value, diagonal, nullptr, masks);
    }
    int64_t c = first;
    for (; c + J <= (full < last ? full : last); c += J) {
      V value[I][J];
      pairs<J>(c, value);
      finish<J>(value, c, sums_i, nullptr);
    }
    for (; c < last; ++c) {
      Bits<T> masks[I];
      for (int i = 0; i < I; ++i) masks[i] = first_lanes<T>(block.rows_j - c * N);
      V value[I][1];
      pairs<1>(c, value);
      finish<1>(value, c, sums_i, masks);
    }
    if constexpr (Flags::values)
      add_lane_sums<T, I>(sums_i, block.totals_i + Flags::value_row(D) * stride + i0);
  }

  void scatter(int64_t diagonal, int64_t first, int64_t last) const {
    for (int64_t d = 0; d < D; ++d) {
      const T* xj = block.j + d * stride;
      T* out = block.sums_j + d * stride;
      V a[I], sums_i[I] = {};
#pragma GCC unroll 8
      for (int i = 0; i < I; ++i) a[i] = broadcast(block.i[d * stride + i0 + i]);
      if (diagonal >= 0) {
        V sum_j = load(out + diagonal * N);
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i)
          sum_j += load(weights + i * kRows + diagonal * N) * scaled_sign(load(xj + diagonal * N) - a[i]);
        store(out + diagonal * N, sum_j);
      }
      for (int64_t c = first; c < last; ++c) {
        const V x = load(xj + c * N);
        V sum_j = {};
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i) {
          const V w = load(weights + i * kRows + c * N), sign = scaled_sign(x - a[i]);
          if (i < I / 2) {  // half of the work on the adders, where the other half leaves them idle
            const V signed_w = opaque(w * sign);
            sum_j = i == 0 ? signed_w : sum_j + signed_w;
            sums_i[i] -= signed_w;
          } else {
            sum_j += w * sign;
            sums_i[i] -= w * sign;
          }
        }
        store(out + c * N, load(out + c * N) + sum_j);
      }
      add_lane_sums<T, I>(sums_i, block.totals_i + d * stride + i0);
    }
  }
};

template <class T, Operator op, bool fixed_point> void block_pair(const BlockPair<T>& block, int64_t D, double* totals_j) {
  using Flags = Layout<op>;
  constexpr int N = kLanes<T>, I = kTile<T>;
  const int64_t vectors = (block.rows_j + N - 1) / N, used = vectors * N;
  for (int64_t row = 0; row < Flags::total_rows(D); ++row)
    for (int64_t r = 0; r < used; ++r) block.sums_j[row * kStride<T> + r] = 0;
  T weights[I * kRows];
  for (int64_t i0 = 0; i0 < block.rows_i; i0 += I) {
    const Tile<T, op, fixed_point> tile{block, D, i0, weights};
    const int64_t diagonal = block.same ? i0 / N : -1;
    tile.values(diagonal, diagonal + 1, vectors);
    if constexpr (Flags::weights) tile.scatter(diagonal, diagonal + 1, vectors);
  }
  for (int64_t row = 0; row < Flags::total_rows(D); ++row)
    for (int64_t r = 0; r < used; ++r) totals_j[row * kStride<T> + r] += block.sums_j[row * kStride<T> + r];
}

FASTGAN_INLINE int64_t rows_of_block(int64_t B, int64_t block) {
  return B - block * kRows < kRows ? B - block * kRows : kRows;
}

// Every stripes-th pair of blocks, from stripe on. scratch holds one block of totals in T.
template <class T, Operator op>
void pairs(const T* packed, int shift, double* totals, T* scratch, int64_t B, int64_t D, bool self_term, int64_t stripe,
           int64_t stripes) {
  using Flags = Layout<op>;
  constexpr int64_t stride = kStride<T>;
  const int64_t blocks = (B + kRows - 1) / kRows;
  int64_t index = 0;
  for (int64_t j = 0; j < blocks; ++j)
    for (int64_t i = 0; i <= j; ++i)
      if (index++ % stripes == stripe) {
        double* block_totals = totals + Flags::total_rows(D) * stride * j;
        const BlockPair<T> block{packed + Flags::packed_rows(D) * stride * i, packed + Flags::packed_rows(D) * stride * j,
                                 totals + Flags::total_rows(D) * stride * i, scratch, rows_of_block(B, i), rows_of_block(B, j), i == j, self_term, shift};
        if constexpr (kFixedPoint && Flags::fixed_point && std::is_same_v<T, float>)
          if (shift > 0) {
            block_pair<T, op, true>(block, D, block_totals);
            continue;
          }
        block_pair<T, op, false>(block, D, block_totals);
      }
}

#if FASTGAN_ISA >= 2
// 8 samples' coordinates, each sample's in one run of memory, into rows: 8 x 8 numbers at a time change places in registers.
FASTGAN_INLINE void transpose(const float* from, int64_t sample, int64_t D, float factor, float* out) {
  for (int64_t d = 0; d < D; d += 8, from += 8, out += 8 * kStride<float>) {
    __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(D - d)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256 x[8], pairs[8], fours[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) x[i] = _mm256_maskload_ps(from + i * sample, mask);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
        fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
      }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m256 row = _mm256_permute2f128_ps(fours[i & 3], fours[(i & 3) + 4], i < 4 ? 0x20 : 0x31);
      if (i < D - d) _mm256_storeu_ps(out + i * kStride<float>, row * factor + 0.0f);
    }
  }
}
#endif

// Packing. Coordinates lie in rows of samples. -0 becomes +0, which scaled_sign wants; the factor turns grad and v into
// what makes sums of scaled signs come out as the specification's: its minus sign, and 1 / kSign.
template <class S, class T>
FASTGAN_INLINE void pack_rows(const Strided& in, int64_t b, int64_t k, int64_t rows, int64_t D, T factor, T* out) {
  constexpr int N = kLanes<T>;
  int64_t r = 0;
#if FASTGAN_ISA >= 2
  if constexpr (std::is_same_v<S, float>)
    if (in.stride[2] == 1)
      for (; r + N <= rows; r += N)
        for (int64_t part = r; part < r + N; part += 8)
          transpose(in.at<S>(b + part, k, 0), in.stride[0], D, factor, out + part);
#endif
  for (; r + N <= rows; r += N) {
    const S* from = in.at<S>(b + r, k, 0);
    for (int64_t d = 0; d < D; ++d) {
      Vector<T> x;
#pragma GCC unroll 16
      for (int lane = 0; lane < N; ++lane) x[lane] = T(from[lane * in.stride[0] + d * in.stride[2]]);
      store(out + d * kStride<T> + r, x * broadcast(factor) + broadcast(T(0)));
    }
  }
  for (; r < rows || r % N != 0; ++r) {  // the last sample fills up its vector
    const S* from = in.at<S>(b + (r < rows ? r : rows - 1), k, 0);
    for (int64_t d = 0; d < D; ++d) out[d * kStride<T> + r] = T(from[d * in.stride[2]]) * factor + T(0);
  }
}

// Returns the shift of distances in fixed point, or 0 where there are none.
template <class S, class T, Operator op> int pack(const Problem& problem, int64_t k, T* const all_packed, T* lowest) {
  using Flags = Layout<op>;
  const int64_t D = problem.D;
  T* packed = all_packed;
  for (int64_t b = 0; b < problem.B; b += kRows, packed += Flags::packed_rows(D) * kStride<T>) {
    const int64_t rows = problem.B - b < kRows ? problem.B - b : kRows;
    pack_rows<S, T>(problem.m, b, k, rows, D, T(1), packed);
    if constexpr (Flags::tangent) pack_rows<S, T>(problem.v, b, k, rows, D, T(-1) / kSign<T>, packed + D * kStride<T>);
    if constexpr (Flags::weights)
      pack_rows<S, T>(problem.grad, b, k, rows, 1, T(-1) / kSign<T>, packed + Flags::grad_row(D) * kStride<T>);
  }
  if constexpr (kFixedPoint && Flags::fixed_point && std::is_same_v<T, float>)
    return to_fixed_point<op>(all_packed, lowest, problem.B, D);
  return 0;
}

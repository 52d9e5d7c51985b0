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
// above the smallest one, with the quantum such that no distance exceeds 2^31 of them. What that rounds off a distance is
// sqrt(D / 6) quanta in the root mean square; samples that spread so far that it would exceed kRoundOff, a quarter of the
// rounding of a float near 1 (or that aren't finite) keep their floats.
constexpr bool kFixedPoint = FASTGAN_ISA >= 2;
constexpr double kQuanta = 2147483000.0, kRoundOff = 1.0 / (1 << 25);

// The packed blocks' coordinates in fixed point: doubled in the rows from fixed_row on, and minus their sum, not doubled, in
// the row after them. Returns the quantum, or 0 where the samples spread too far. lowest holds D values in between.
template <Operator op> FASTGAN_INLINE float to_fixed_point(float* packed, float* lowest, int64_t B, int64_t D) {
  using Flags = Layout<op>;
  using V = FloatVector;
  typedef float HalfVector __attribute__((vector_size(kVectorBytes / 2)));
  typedef int32_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
  constexpr int N = kLanes<float>;
  constexpr int64_t stride = kStride<float>;
  const int64_t block_size = Flags::packed_rows(D) * stride;
  double spread = 0;
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
    spread += double(largest) - double(smallest) + sum<float>(not_finite);
  }
  const double quantum = spread / kQuanta;
  if (!(spread <= kLargestExponent && quantum * std::sqrt(D / 6.0) <= kRoundOff)) return 0;
  const double scale = spread > 0 ? kQuanta / spread : 0;
  for (int64_t b = 0; b < B; b += kRows, packed += block_size) {
    float* sums = packed + (Flags::fixed_row(D) + D) * stride;
    for (int64_t r = 0; r < kRows && b + r < B; r += N) store(sums + r, V{});
    for (int64_t d = 0; d < D; ++d) {
      const DoubleVector offset = broadcast(0.5 - lowest[d] * scale);
      for (int64_t r = 0; r < kRows && b + r < B; r += N / 2) {
        HalfVector x;
        HalfBits total;
        std::memcpy(&x, packed + d * stride + r, sizeof x);
        std::memcpy(&total, sums + r, sizeof total);
        const HalfBits value = __builtin_convertvector(__builtin_convertvector(x, DoubleVector) * scale + offset, HalfBits);
        const HalfBits doubled = value << 1;
        total -= value;
        std::memcpy(packed + (Flags::fixed_row(D) + d) * stride + r, &doubled, sizeof doubled);
        std::memcpy(sums + r, &total, sizeof total);
      }
    }
  }
  return float(quantum);
}

// The two blocks of a pair: i < j, or the same one.
template <class T> struct BlockPair {
  const T *i, *j;  // packed
  double* totals_i;
  T* sums_j;  // laid out as totals
  int64_t rows_i, rows_j;
  bool same, self_term;
  T quantum;  // of the coordinates in fixed point, or 0 where there are none
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

template <int I, int J>
FASTGAN_INLINE void pair_values_in_fixed_point(const float* xi, const float* xj, int64_t D, float quantum,
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
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j)
      value[i][j] = exp_minus_of_small(__builtin_convertvector((Int32Vector)distance[i][j], FloatVector) * quantum);
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
      pair_values_in_fixed_point<I, columns>(block.i + row + i0, block.j + row + c * N, D, block.quantum, value);
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
            const V signed_w = rounded(w * sign);
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
void pairs(const T* packed, T quantum, double* totals, T* scratch, int64_t B, int64_t D, bool self_term, int64_t stripe,
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
                                 totals + Flags::total_rows(D) * stride * i, scratch, rows_of_block(B, i), rows_of_block(B, j), i == j, self_term, quantum};
        if constexpr (kFixedPoint && Flags::fixed_point && std::is_same_v<T, float>)
          if (quantum > 0) {
            block_pair<T, op, true>(block, D, block_totals);
            continue;
          }
        block_pair<T, op, false>(block, D, block_totals);
      }
}

// Packing. Coordinates lie in rows of samples. -0 becomes +0, which scaled_sign wants; the factor turns grad and v into
// what makes sums of scaled signs come out as the specification's: its minus sign, and 1 / kSign.
template <class S, class T>
FASTGAN_INLINE void pack_rows(const Strided& in, int64_t b, int64_t k, int64_t rows, int64_t D, T factor, T* out) {
  constexpr int N = kLanes<T>;
  int64_t r = 0;
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

// Returns the quantum of the coordinates in fixed point, or 0 where there are none.
template <class S, class T, Operator op> T pack(const Problem& problem, int64_t k, T* const all_packed, T* lowest) {
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

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

// The two blocks of a pair: i < j, or the same one.
template <class T> struct BlockPair {
  const T *i, *j;  // packed
  double* totals_i;
  T* sums_j;  // laid out as totals
  int64_t rows_i, rows_j;
  bool same, self_term;
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

// Samples i0.. against the vectors [first, last) of block j, after the vector diagonal (if any) for the j side alone.
template <class T, Operator op> struct Tile {
  using V = Vector<T>;
  using Flags = Layout<op>;
  static constexpr int N = kLanes<T>, I = kTile<T>, J = Flags::tangent ? 1 : 2;
  static constexpr int64_t stride = kStride<T>;

  const BlockPair<T>& block;
  int64_t D, i0;
  T* weights;  // (I, kRows)

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
    const T* xi = block.i + i0;
    V sums_i[I] = {};
    const int64_t full = block.rows_j / N;
    if (diagonal >= 0) {
      Bits<T> masks[I];
      for (int i = 0; i < I; ++i) {
        masks[i] = first_lanes<T>(i0 + i < block.rows_i ? block.rows_j - diagonal * N : 0);
        if (op == Operator::forward && !block.self_term) masks[i][i0 + i - diagonal * N] = 0;
      }
      V value[I][1];
      pair_values<T, Flags::tangent, I, 1>(xi, block.j + diagonal * N, D, value);
      finish<1>(value, diagonal, nullptr, masks);
    }
    int64_t c = first;
    for (; c + J <= (full < last ? full : last); c += J) {
      V value[I][J];
      pair_values<T, Flags::tangent, I, J>(xi, block.j + c * N, D, value);
      finish<J>(value, c, sums_i, nullptr);
    }
    for (; c < last; ++c) {
      Bits<T> masks[I];
      for (int i = 0; i < I; ++i) masks[i] = first_lanes<T>(block.rows_j - c * N);
      V value[I][1];
      pair_values<T, Flags::tangent, I, 1>(xi, block.j + c * N, D, value);
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
          sum_j = i == 0 ? w * sign : sum_j + w * sign;
          sums_i[i] -= w * sign;
        }
        store(out + c * N, load(out + c * N) + sum_j);
      }
      add_lane_sums<T, I>(sums_i, block.totals_i + d * stride + i0);
    }
  }
};

template <class T, Operator op> void block_pair(const BlockPair<T>& block, int64_t D, double* totals_j) {
  using Flags = Layout<op>;
  constexpr int N = kLanes<T>, I = kTile<T>;
  const int64_t vectors = (block.rows_j + N - 1) / N, used = vectors * N;
  for (int64_t row = 0; row < Flags::total_rows(D); ++row)
    for (int64_t r = 0; r < used; ++r) block.sums_j[row * kStride<T> + r] = 0;
  T weights[I * kRows];
  for (int64_t i0 = 0; i0 < block.rows_i; i0 += I) {
    const Tile<T, op> tile{block, D, i0, weights};
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
void pairs(const T* packed, double* totals, T* scratch, int64_t B, int64_t D, bool self_term, int64_t stripe, int64_t stripes) {
  using Flags = Layout<op>;
  constexpr int64_t stride = kStride<T>;
  const int64_t blocks = (B + kRows - 1) / kRows;
  int64_t index = 0;
  for (int64_t j = 0; j < blocks; ++j)
    for (int64_t i = 0; i <= j; ++i)
      if (index++ % stripes == stripe) {
        double* block_totals = totals + Flags::total_rows(D) * stride * j;
        const BlockPair<T> block{packed + Flags::packed_rows(D) * stride * i, packed + Flags::packed_rows(D) * stride * j,
                                 totals + Flags::total_rows(D) * stride * i, scratch, rows_of_block(B, i), rows_of_block(B, j), i == j, self_term};
        block_pair<T, op>(block, D, block_totals);
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
  for (; r < rows || r % N != 0; ++r) {
    const S* from = r < rows ? in.at<S>(b + r, k, 0) : nullptr;
    for (int64_t d = 0; d < D; ++d) out[d * kStride<T> + r] = from ? T(from[d * in.stride[2]]) * factor + T(0) : T(0);
  }
}

template <class S, class T, Operator op> void pack(const Problem& problem, int64_t k, T* packed) {
  using Flags = Layout<op>;
  const int64_t D = problem.D;
  for (int64_t b = 0; b < problem.B; b += kRows, packed += Flags::packed_rows(D) * kStride<T>) {
    const int64_t rows = problem.B - b < kRows ? problem.B - b : kRows;
    pack_rows<S, T>(problem.m, b, k, rows, D, T(1), packed);
    if constexpr (Flags::tangent) pack_rows<S, T>(problem.v, b, k, rows, D, T(-1) / kSign<T>, packed + D * kStride<T>);
    if constexpr (Flags::weights)
      pack_rows<S, T>(problem.grad, b, k, rows, 1, T(-1) / kSign<T>, packed + Flags::grad_row(D) * kStride<T>);
  }
}

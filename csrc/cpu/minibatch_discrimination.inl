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
template <class T> constexpr int kVectors = kRows / kLanes<T>;  // per block

// The two blocks of a pair: i < j, or the same one.
template <class T> struct BlockPair {
  const T *i, *j;            // packed
  double* totals_i;
  T* sums_j;                 // laid out as totals
  int64_t rows_i, rows_j;
  bool same, self_term;
};

template <class T, bool tangent, int I, int J>
FASTGAN_INLINE void pair_values(const T* xi, const T* xj, int64_t D, Vector<T> (&value)[I][J]) {
  using V = Vector<T>;
  constexpr int64_t stride = kStride<T>;
  V distance[I][J] = {}, p[I][J] = {};
  const T *vi = xi + D * stride, *vj = xj + D * stride;
  for (int64_t d = 0; d < D; ++d) {
    V x[J], v[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      x[j] = load(xj + d * stride + j * kLanes<T>);
      if (tangent) v[j] = load(vj + d * stride + j * kLanes<T>);
    }
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      const V a = broadcast(xi[d * stride + i]);
      const V b = tangent ? broadcast(vi[d * stride + i]) : a;
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) {
        const V difference = x[j] - a;
        distance[i][j] += absolute(difference);
        if (tangent) p[i][j] += scaled_sign(difference) * (v[j] - b);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      value[i][j] = exp_minus(distance[i][j]);
      if (tangent) value[i][j] *= p[i][j];
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
      for (int i = 0; i < I; ++i) block.totals_i[Flags::value_row(D) * stride + i0 + i] += sum<T>(sums_i[i]);
  }

  void scatter(int64_t diagonal, int64_t first, int64_t last) const {
    for (int64_t d = 0; d < D; ++d) {
      const T* xj = block.j + d * stride;
      T* out = block.sums_j + d * stride;
      V a[I], sums_i[I] = {};
      for (int i = 0; i < I; ++i) a[i] = broadcast(block.i[d * stride + i0 + i]);
      if (diagonal >= 0) {
        V sum_j = load(out + diagonal * N);
        for (int i = 0; i < I; ++i)
          sum_j += load(weights + i * kRows + diagonal * N) * scaled_sign(load(xj + diagonal * N) - a[i]);
        store(out + diagonal * N, sum_j);
      }
      for (int64_t c = first; c < last; ++c) {
        const V x = load(xj + c * N);
        V sum_j = load(out + c * N);
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i) {
          const V w = load(weights + i * kRows + c * N), sign = scaled_sign(x - a[i]);
          sum_j += w * sign;
          sums_i[i] -= w * sign;
        }
        store(out + c * N, sum_j);
      }
      for (int i = 0; i < I; ++i) block.totals_i[d * stride + i0 + i] += sum<T>(sums_i[i]);
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

FASTGAN_INLINE int64_t rows_of_block(int64_t B, int64_t block) { return B - block * kRows < kRows ? B - block * kRows : kRows; }

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
template <class S, class T> FASTGAN_INLINE void pack_row(const S* in, int64_t in_stride, int64_t rows, T factor, T* out) {
  for (int64_t r = 0; r < rows; ++r) out[r] = T(in[r * in_stride]) * factor + T(0);
  for (int64_t r = rows; r % kLanes<T> != 0; ++r) out[r] = 0;
}

template <class S, class T, Operator op> void pack(const Problem& problem, int64_t k, T* packed) {
  using Flags = Layout<op>;
  const int64_t D = problem.D;
  for (int64_t b = 0; b < problem.B; b += kRows, packed += Flags::packed_rows(D) * kStride<T>) {
    const int64_t rows = problem.B - b < kRows ? problem.B - b : kRows;
    for (int64_t d = 0; d < D; ++d) {
      pack_row<S, T>(problem.m.at<S>(b, k, d), problem.m.stride[0], rows, T(1), packed + d * kStride<T>);
      if constexpr (Flags::tangent)
        pack_row<S, T>(problem.v.at<S>(b, k, d), problem.v.stride[0], rows, T(-1) / kSign<T>, packed + (D + d) * kStride<T>);
    }
    if constexpr (Flags::weights)
      pack_row<S, T>(problem.grad.at<S>(b, k, 0), problem.grad.stride[0], rows, T(-1) / kSign<T>,
                     packed + Flags::grad_row(D) * kStride<T>);
  }
}

// A block of points x against all points y, per instruction set. fastgan/ops/pairwise_kernel_sum.py has the mathematics.
//
// kTileRows points x meet a panel of points y at a time, lanes being different y: their distances or products, then the kernel,
// or its slope times the cotangents. The backward pass keeps the slopes of kColumns points y, and sums them up times x - y (or
// its signs, or y) with lanes being coordinates. Sums over kColumns are in T, sums of those in double.

template <class T> constexpr int64_t kPanel = 2 * kLanes<T>;

// Points y in panels: kPanel of them side by side, coordinate by coordinate; the last panel is filled up with zeros.
template <class T> void pack_panels(const T* rows, int64_t ld, int64_t count, int64_t D, int64_t begin, int64_t end, T* out) {
  constexpr int64_t P = kPanel<T>;
  for (int64_t panel = begin; panel < end; ++panel) {
    T* to = out + panel * P * D;
    const int64_t used = count - panel * P < P ? count - panel * P : P;
    for (int64_t lane = 0; lane < P; ++lane) {
      const T* from = rows + (panel * P + lane) * ld;
      for (int64_t d = 0; d < D; ++d) to[d * P + lane] = lane < used ? from[d] : T(0);
    }
  }
}

// Distances in fixed point, for sums of absolute differences: |a - b| = 2 max(a, b) - a - b, of which only max and a sum are left
// per pair and coordinate, on integers, where they are exact. What a quantum rounds off is limited by the caller.
static inline void to_fixed_point(const float* x, int64_t D, const FixedPoint& fixed, uint32_t* doubled, int64_t stride, uint32_t* sum) {
  uint32_t total = 0;
  for (int64_t d = 0; d < D; ++d) {
    const uint32_t value = uint32_t(int64_t((double(x[d]) - fixed.lowest[d]) * fixed.scale + 0.5));
    doubled[d * stride] = 2 * value;
    total -= value;
  }
  *sum = total;
}

template <class T> void pack_fixed_rows(const Job<T>& job, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    to_fixed_point((const float*)job.x + i * job.ld, job.D, job.fixed, job.fixed.x + i * job.D, 1, job.fixed.x_sums + i);
}
template <class T> void pack_fixed_panels(const Job<T>& job, int64_t begin, int64_t end) {
  constexpr int64_t P = kPanel<T>;
  for (int64_t j = begin * P; j < end * P; ++j) {
    const int64_t from = j < job.M ? j : job.M - 1;
    to_fixed_point((const float*)job.y + from * job.ld, job.D, job.fixed, job.fixed.y + j / P * P * job.D + j % P, P, job.fixed.y_sums + j);
    job.fixed.y_sums[j] += 1;  // halving rounds to nearest
  }
}

// Adds coordinates begin .. end to what the kernel is a function of: ||x - y||_1, ||x - y||^2 or x.y.
template <class T, int p>
FASTGAN_INLINE void add_coordinates(const T* x, int64_t ld, const T* y, int64_t begin, int64_t end, Vector<T> (&q)[kTileRows][2]) {
  using V = Vector<T>;
  constexpr int N = kLanes<T>;
#pragma GCC unroll 4
  for (int64_t d = begin; d < end; ++d) {
    const V y0 = load(y + d * 2 * N), y1 = load(y + d * 2 * N + N);
#pragma GCC unroll 4
    for (int i = 0; i < kTileRows; ++i) {
      const V own = broadcast(x[i * ld + d]);
      if constexpr (p == 0) {
        q[i][0] += own * y0, q[i][1] += own * y1;
      } else {
        const V d0 = p == 1 ? difference(own, y0) : own - y0, d1 = p == 1 ? difference(own, y1) : own - y1;
        if constexpr (p == 1)
          q[i][0] += absolute(d0), q[i][1] += absolute(d1);
        else
          q[i][0] += d0 * d0, q[i][1] += d1 * d1;
      }
    }
  }
}

// What the kernel is a function of, for kTileRows points x and a panel of y, into q (kTileRows, kColumns). A function of its own,
// lest what surrounds it takes registers from the sums.
template <class T, int p, bool fixed> __attribute__((noinline)) void similarities(const Job<T>& job, int64_t i, int64_t panel, T* q) {
  constexpr int N = kLanes<T>;
  constexpr int64_t P = kPanel<T>;
  if constexpr (fixed) {
    const uint32_t *x = job.fixed.x + i * job.D, *y = job.fixed.y + panel * P * job.D;
    const auto row = [](const uint32_t* from) {
      UInt32Vector value;
      std::memcpy(&value, from, sizeof value);
      return value;
    };
    const auto one = [](uint32_t value) { return value - UInt32Vector{}; };
    UInt32Vector distance[kTileRows][2];
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) distance[r][j] = row(job.fixed.y_sums + panel * P + j * N) + one(job.fixed.x_sums[i + r]);
#pragma GCC unroll 4
    for (int64_t d = 0; d < job.D; ++d) {
      const UInt32Vector y0 = row(y + d * P), y1 = row(y + d * P + N);
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) {
        const UInt32Vector own = one(x[r * job.D + d]);
        distance[r][0] += larger(own, y0);
        distance[r][1] += larger(own, y1);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j)
        store(q + r * kColumns + j * N, __builtin_convertvector((Int32Vector)(distance[r][j] >> 1), FloatVector));
  } else {
    constexpr int64_t kChunk = 64;  // coordinates whose sum is added at once: fewer roundings at full size
    const T *x = job.x + i * job.ld, *y = job.panels + panel * P * job.D;
    for (int64_t d = 0; d == 0 || d < job.D; d += kChunk) {
      Vector<T> part[kTileRows][2] = {};
      add_coordinates<T, p>(x, job.ld, y, d, d + kChunk < job.D ? d + kChunk : job.D, part);
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          T* to = q + r * kColumns + j * N;
          store(to, d == 0 ? part[r][j] : load(to) + part[r][j]);
        }
    }
  }
}

FASTGAN_INLINE FloatVector power(FloatVector t, float exponent) {
  for (int lane = 0; lane < kLanes<float>; ++lane) t[lane] = __builtin_powf(t[lane], exponent);
  return t;
}
FASTGAN_INLINE DoubleVector power(DoubleVector t, double exponent) {
  for (int lane = 0; lane < kLanes<double>; ++lane) t[lane] = __builtin_pow(t[lane], exponent);
  return t;
}
// t^exponent; without a library's function where it is a small integer or, below 0, half of one.
template <class T> FASTGAN_INLINE void raise(Vector<T> (&t)[kTileRows], T exponent) {
  const T size = exponent < 0 ? -exponent : exponent;
  const int twice = size <= 32 ? int(2 * size) : -1;
  if (twice != 2 * size || (twice % 2 && exponent > 0)) {
    for (int i = 0; i < kTileRows; ++i) t[i] = power(t[i], exponent);
    return;
  }
  Vector<T> result[kTileRows];
  for (int i = 0; i < kTileRows; ++i) result[i] = twice % 2 ? square_root(t[i]) : broadcast(T(1));
  for (int k = 0; k < twice / 2; ++k)
#pragma GCC unroll 4
    for (int i = 0; i < kTileRows; ++i) result[i] *= t[i];
#pragma GCC unroll 4
  for (int i = 0; i < kTileRows; ++i) t[i] = exponent < 0 ? T(1) / result[i] : result[i];
}

// The kernel, or its slope: with the factors and the exponent that mixture has for it. Several at once, lest each waits for itself.
template <class T, Kernel kernel, bool gradient>
FASTGAN_INLINE void evaluate(const Mixture<T>& mixture, Vector<T> (&q)[kTileRows]) {
  Vector<T> total[kTileRows] = {};
  for (int64_t b = 0; b < mixture.count; ++b) {
    const T scale = mixture.scales[b], factor = mixture.factors[b];
    Vector<T> k[kTileRows];
#pragma GCC unroll 4
    for (int i = 0; i < kTileRows; ++i) k[i] = kernel == Kernel::energy ? square_root(q[i]) : q[i] * scale + mixture.offset;
    if constexpr (kernel == Kernel::laplacian || kernel == Kernel::gaussian)
#pragma GCC unroll 4
      for (int i = 0; i < kTileRows; ++i) k[i] = exp_minus(k[i]);
    else if constexpr (kernel == Kernel::energy && gradient)
#pragma GCC unroll 4
      for (int i = 0; i < kTileRows; ++i) k[i] = keep(T(1) / k[i], k[i] != Vector<T>{});
    else if constexpr (kernel != Kernel::energy)
      raise(k, mixture.exponent);
#pragma GCC unroll 4
    for (int i = 0; i < kTileRows; ++i) total[i] += k[i] * factor;
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTileRows; ++i) q[i] = total[i];
}

// What a slope is that of a step along: x - y, its signs, or y.
template <class T, int p> FASTGAN_INLINE Vector<T> direction(Vector<T> x, Vector<T> y) {
  if constexpr (p == 0) return y;
  if constexpr (p == 1) return scaled_sign(x - y);
  return x - y;
}

// Points y whose terms are added up before that sum is added to others: fewer roundings at full size.
constexpr int64_t kRun = 32;

template <class T, int V> FASTGAN_INLINE void load_tile(const T* from, int64_t ld, Vector<T> (&to)[kTileRows][V]) {
#pragma GCC unroll 4
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) to[i][v] = load(from + i * ld + v * kLanes<T>);
}
template <class T, int V> FASTGAN_INLINE void add_tile(const Vector<T> (&sums)[kTileRows][V], int64_t ld, double* totals) {
  for (int i = 0; i < kTileRows; ++i) {
    T lanes[V * kLanes<T>];
    for (int v = 0; v < V; ++v) store(lanes + v * kLanes<T>, sums[i][v]);
    for (int lane = 0; lane < V * kLanes<T>; ++lane) totals[i * ld + lane] += lanes[lane];
  }
}

// Adds to totals (kTileRows, ld) what the slopes (kTileRows, kColumns) of count points y make of V vectors of coordinates.
template <class T, int p, int V>
__attribute__((noinline)) void gather(const T* slopes, const T* x, const T* y, int64_t ld, int64_t count, double* totals) {
  Vector<T> own[kTileRows][V], sums[kTileRows][V] = {};
  load_tile<T, V>(x, ld, own);
  for (int64_t begin = 0; begin < count; begin += kRun) {
    constexpr int chains = V == 1 ? 2 : 1;  // as many sums as don't wait for themselves: even and odd points apart
    Vector<T> run[chains][kTileRows][V] = {};
    const auto add = [&](int which, int64_t j) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const Vector<T> other = load(y + j * ld + v * kLanes<T>);
#pragma GCC unroll 4
        for (int i = 0; i < kTileRows; ++i)
          run[which][i][v] += broadcast(slopes[i * kColumns + j]) * direction<T, p>(own[i][v], other);
      }
    };
    const int64_t end = begin + kRun < count ? begin + kRun : count;
    int64_t j = begin;
    for (; j + 2 <= end; j += 2) add(0, j), add(chains - 1, j + 1);
    if (j < end) add(0, j);
#pragma GCC unroll 4
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[i][v] += chains == 1 ? run[0][i][v] : run[0][i][v] + run[chains - 1][i][v];
  }
  add_tile<T, V>(sums, ld, totals);
}

// The same for one vector of coordinates, and into sums_y (count, ld) what the slopes make of them for the points y.
template <class T, int p>
__attribute__((noinline)) void gather_both(const T* slopes, const T* x, const T* y, int64_t ld, int64_t count, double* totals, T* sums_y) {
  Vector<T> own[kTileRows][1], sums[kTileRows][1] = {};
  load_tile<T, 1>(x, ld, own);
  for (int64_t begin = 0; begin < count; begin += kRun / 2) {
    const int64_t end = begin + kRun / 2 < count ? begin + kRun / 2 : count;
    Vector<T> run[kTileRows] = {};
    for (int64_t j = begin; j < end; ++j) {
      const Vector<T> other = load(y + j * ld);
      Vector<T> sum_y = load(sums_y + j * ld);
#pragma GCC unroll 4
      for (int i = 0; i < kTileRows; ++i) {
        const Vector<T> slope = broadcast(slopes[i * kColumns + j]), u = direction<T, p>(own[i][0], other);
        run[i] += slope * u;
        if constexpr (p == 0)
          sum_y += slope * own[i][0];
        else
          sum_y -= slope * u;
      }
      store(sums_y + j * ld, sum_y);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTileRows; ++i) sums[i][0] += run[i];
  }
  add_tile<T, 1>(sums, ld, totals);
}

// Of kTileRows points x from i on and a vector of points y from j on, of which so many count: the kernel and its slopes times their
// cotangents, from what the kernel is a function of. What doesn't count is 0.
template <class T, Kernel kernel, Sweep sweep>
FASTGAN_INLINE void evaluate_pairs(const Job<T>& job, int64_t i, int64_t j, int64_t count, Vector<T> (&k)[kTileRows], Vector<T> (&h)[kTileRows]) {
  constexpr int N = kLanes<T>;
  if constexpr (sweep == Sweep::forward || sweep == Sweep::with_gradient) evaluate<T, kernel, false>(job.values, k);
  if constexpr (sweep != Sweep::forward) evaluate<T, kernel, true>(job.slopes, h);
  if constexpr (sweep == Sweep::backward || sweep == Sweep::both)
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) h[r] *= load(job.column + j) + broadcast(job.row[i + r]);
  if (count < N)
    for (int r = 0; r < kTileRows; ++r) {
      k[r] = keep(k[r], first_lanes<T>(count));
      h[r] = keep(h[r], first_lanes<T>(count));
    }
  const int64_t diagonal = i - j;  // where the first row's own point is
  if (job.exclude_diagonal && diagonal > -kTileRows && diagonal < N)
    for (int64_t r = diagonal < 0 ? -diagonal : 0; r < kTileRows && diagonal + r < N; ++r) k[r][diagonal + r] = h[r][diagonal + r] = 0;
}

// Points x from i0 on, kBlockRows of them or as many as there are. values (kBlockRows) and totals (kBlockRows, ld), zero, get sums
// of the kernel and gradients.
// totals_y: (M, ld); this block's part is added. sums_y: scratch of (kColumns, ld).
template <class T, Kernel kernel, Sweep sweep, bool fixed>
void block(const Job<T>& job, int64_t i0, int64_t rows, double* values, double* totals, double* totals_y, T* sums_y) {
  using V = Vector<T>;
  constexpr bool value = sweep == Sweep::forward || sweep == Sweep::with_gradient, gradient = sweep != Sweep::forward;
  constexpr int N = kLanes<T>, p = p_of(kernel), directions = p == 0 ? 2 : 1;
  constexpr int64_t P = kPanel<T>;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, ld = job.ld;
  alignas(kVectorBytes) T tile[kBlockRows * kColumns];
  for (int64_t j0 = 0; j0 < job.M; j0 += kColumns) {
    const int64_t columns = job.M - j0 < kColumns ? job.M - j0 : kColumns;
    for (int64_t j = 0; j < columns; j += P)
      for (int64_t t = 0; t < tiles; ++t)
        similarities<T, p, fixed>(job, i0 + t * kTileRows, (j0 + j) / P, tile + t * kTileRows * kColumns + j);
    for (int64_t t = 0; t < tiles; ++t) {
      T* const q = tile + t * kTileRows * kColumns;
      V sums[kTileRows] = {};
      for (int64_t j = 0; j < columns; j += N) {
        V k[kTileRows], h[kTileRows];
#pragma GCC unroll 4
        for (int i = 0; i < kTileRows; ++i) k[i] = h[i] = load(q + i * kColumns + j);
        evaluate_pairs<T, kernel, sweep>(job, i0 + t * kTileRows, j0 + j, columns - j, k, h);
#pragma GCC unroll 4
        for (int i = 0; i < kTileRows; ++i) {
          if constexpr (value) sums[i] += k[i];
          if constexpr (gradient) store(q + i * kColumns + j, h[i]);
        }
      }
      if constexpr (value) add_lane_sums<T, kTileRows>(sums, values + t * kTileRows);
    }
    if constexpr (gradient && sweep != Sweep::both)
      for (int64_t d = 0; d < job.D; d += directions * N)
        for (int64_t i = 0; i < rows; i += kTileRows)
          gather<T, p, directions>(tile + i * kColumns, job.x + (i0 + i) * ld + d, job.y + j0 * ld + d, ld, columns, totals + i * ld + d);
    if constexpr (sweep == Sweep::both) {
      for (int64_t k = 0; k < columns * ld; ++k) sums_y[k] = 0;
      for (int64_t d = 0; d < job.D; d += N)
        for (int64_t i = 0; i < rows; i += kTileRows)
          gather_both<T, p>(tile + i * kColumns, job.x + (i0 + i) * ld + d, job.y + j0 * ld + d, ld, columns, totals + i * ld + d, sums_y + d);
      for (int64_t k = 0; k < columns * ld; ++k) totals_y[j0 * ld + k] += sums_y[k];
    }
  }
}

// By matrix product: a tile of scalar products of points x and y becomes, in place, that of the slopes.

// Is any bit set?
template <class B> FASTGAN_INLINE bool any(B mask) {
#if FASTGAN_ISA == 2
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif FASTGAN_ISA == 512
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask);
#else
  return ((Int64Vector)mask)[0] | ((Int64Vector)mask)[1];
#endif
}

template <class T> static inline T squared_distance(const T* x, const T* y, int64_t D) {
  Vector<T> sums[2] = {};
  for (int64_t d = 0; d < D; d += 2 * kLanes<T>)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Vector<T> difference = load(x + d + v * kLanes<T>) - load(y + d + v * kLanes<T>);
      sums[v] += difference * difference;
    }
  return sum<T>(sums[0] + sums[1]);
}

// The squared distances of what lanes a mask has set, from differences, into q.
template <class T> __attribute__((noinline)) void measure_close(const Job<T>& job, int64_t i, int64_t j, const Bits<T>& close, Vector<T>& q) {
  for (int lane = 0; lane < kLanes<T> && j + lane < job.M; ++lane)
    if (close[lane]) q[lane] = squared_distance(job.x + i * job.ld, job.y + (j + lane) * job.ld, job.D);
}

// Takes their slopes out of h, and adds what they make of the differences to the sums that are subtracted at the end.
template <class T>
__attribute__((noinline)) void gather_close(const Job<T>& job, int64_t i, int64_t j, const Bits<T>& close, Vector<T>& h, T* sums, T* sums_y) {
  const T* const x = job.x + i * job.ld;
  for (int lane = 0; lane < kLanes<T> && j + lane < job.M; ++lane) {
    const T slope = h[lane];
    if (!close[lane] || slope == 0) continue;
    h[lane] = 0;
    const T* const y = job.y + (j + lane) * job.ld;
    T* const to = sums_y ? sums_y + (j + lane) * job.ld : nullptr;
    for (int64_t d = 0; d < job.D; d += kLanes<T>) {
      const Vector<T> part = broadcast(slope) * (load(x + d) - load(y + d));
      store(sums + d, load(sums + d) - part);
      if (to) store(to + d, load(to + d) + part);
    }
  }
}

// Rows, a multiple of kTileRows, from i0 on. values and slopes (rows) and slopes_y (M) get sums added; sums (rows, ld) and sums_y
// (M, ld), as gather_close has them, the part of close pairs.
template <class T, Kernel kernel, Sweep sweep>
void product_tile(const Job<T>& job, int64_t i0, int64_t rows, int64_t j0, int64_t columns, T* tile, double* values, double* slopes, T* sums,
                  double* slopes_y, T* sums_y) {
  using V = Vector<T>;
  constexpr bool distances = p_of(kernel) == 2, value = sweep == Sweep::forward || sweep == Sweep::with_gradient;
  constexpr bool gradient = sweep != Sweep::forward, both = sweep == Sweep::both;
  constexpr int N = kLanes<T>;
  T columns_slopes[kProductColumns + N] = {};
  for (int64_t i = 0; i < rows; i += kTileRows) {
    T* const q = tile + i * kProductStride;
    V value_sums[kTileRows] = {}, slope_sums[kTileRows] = {};
    for (int64_t j = 0; j < columns; j += N) {
      V k[kTileRows], h[kTileRows];
      Bits<T> close[kTileRows], some = {};
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) {
        V t = load(q + r * kProductStride + j);
        if constexpr (distances) {
          const V squares = load(job.products.y_squares + j0 + j) + job.products.x_squares[i0 + i + r];
          t = squares - (t + t);
          close[r] = t <= squares * T(kClose);
          some |= close[r];
        }
        k[r] = t;
      }
      if (distances && any(some))
        for (int r = 0; r < kTileRows; ++r)
          if (any(close[r])) measure_close<T>(job, i0 + i + r, j0 + j, close[r], k[r]);
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) h[r] = k[r];
      evaluate_pairs<T, kernel, sweep>(job, i0 + i, j0 + j, columns - j, k, h);
      if constexpr (distances && gradient)
        if (any(some))
          for (int r = 0; r < kTileRows; ++r)
            if (any(close[r])) gather_close<T>(job, i0 + i + r, j0 + j, close[r], h[r], sums + (i + r) * job.ld, sums_y);
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) {
        if constexpr (value) value_sums[r] += k[r];
        if constexpr (gradient) store(q + r * kProductStride + j, h[r]);
        if constexpr (gradient && distances) slope_sums[r] += h[r];
      }
      if constexpr (both && distances) store(columns_slopes + j, load(columns_slopes + j) + ((h[0] + h[1]) + (h[2] + h[3])));
    }
    if constexpr (value) add_lane_sums<T, kTileRows>(value_sums, values + i);
    if constexpr (gradient && distances) add_lane_sums<T, kTileRows>(slope_sums, slopes + i);
  }
  if constexpr (both && distances)
    for (int64_t j = 0; j < columns; ++j) slopes_y[j0 + j] += columns_slopes[j];
}

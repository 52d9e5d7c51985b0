// The inner loops of spectral norm, per instruction set. fastgan/ops/spectral_norm.py has the mathematics,
// spectral_norm.cpp the matrices' layout and the distribution over threads.

// y[r] = w_r . q for count rows, which are 4 or 1, and with z also z += y[r] w_r while the rows are still in cache.
template <class T, int count>
FASTGAN_INLINE void some_rows(const T* w, int64_t stride, int64_t columns, const T* q, T* y, T* z) {
  using V = Vector<T>;
  constexpr int N = kLanes<T>, chains = count == 1 ? 4 : 2;  // enough independent sums to hide the latency of additions
  V sums[count][chains] = {};
  int64_t c = 0;
  for (; c + chains * N <= columns; c += chains * N)
#pragma GCC unroll 4
    for (int k = 0; k < chains; ++k) {
      const V x = load(q + c + k * N);
#pragma GCC unroll 4
      for (int r = 0; r < count; ++r) sums[r][k] += load(w + r * stride + c + k * N) * x;
    }
  for (int r = 0; r < count; ++r) {
    V total = sums[r][0];
    for (int k = 1; k < chains; ++k) total += sums[r][k];
    y[r] = sum<T>(total);
    for (int64_t rest = c; rest < columns; ++rest) y[r] += w[r * stride + rest] * q[rest];
  }
  if (!z) return;
  V factors[count];
  for (int r = 0; r < count; ++r) factors[r] = broadcast(y[r]);
  for (c = 0; c + N <= columns; c += N) {
    V total = load(z + c);
#pragma GCC unroll 4
    for (int r = 0; r < count; ++r) total += load(w + r * stride + c) * factors[r];
    store(z + c, total);
  }
  for (; c < columns; ++c)
    for (int r = 0; r < count; ++r) z[c] += w[r * stride + c] * y[r];
}

template <class T> void rows(const T* w, int64_t stride, int64_t columns, int64_t count, const T* q, T* y, T* z) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) some_rows<T, 4>(w + r * stride, stride, columns, q, y + r, z);
  for (; r < count; ++r) some_rows<T, 1>(w + r * stride, stride, columns, q, y + r, z);
}

// The other order, on a tile of columns that fits the second-level cache over all rows: z = sum_r p[r] w_r, then
// y[r] += w_r . z, whose lanes are left for the end. The tile is 2^k vectors wide.
template <class T, int vectors>
FASTGAN_INLINE void tile_of(const T* w, int64_t stride, int64_t count, const T* p, T* z, T* y) {
  using V = Vector<T>;
  constexpr int N = kLanes<T>, chains = vectors >= 4 ? 1 : 4 / vectors;
  V sums[chains][vectors] = {};
  int64_t r = 0;
  for (; r + chains <= count; r += chains)
#pragma GCC unroll 4
    for (int i = 0; i < chains; ++i) {
      const V x = broadcast(p[r + i]);
#pragma GCC unroll 16
      for (int k = 0; k < vectors; ++k) sums[i][k] += load(w + (r + i) * stride + k * N) * x;
    }
  for (; r < count; ++r)
    for (int k = 0; k < vectors; ++k) sums[0][k] += load(w + r * stride + k * N) * broadcast(p[r]);
  for (int i = 1; i < chains; ++i)
    for (int k = 0; k < vectors; ++k) sums[0][k] += sums[i][k];
  for (int k = 0; k < vectors; ++k) store(z + k * N, sums[0][k]);
  for (r = 0; r < count; ++r) {
    V total = load(y + r * N);
#pragma GCC unroll 16
    for (int k = 0; k < vectors; ++k) total += load(w + r * stride + k * N) * sums[0][k];
    store(y + r * N, total);
  }
}

// The same on a wide tile, whose columns are whole vectors, eight rows at a time: reading runs of kWideBytes per row, the
// hardware fetches ahead, and pages are translated once per run. The second reading comes from the third-level cache.
template <class T, int count> FASTGAN_INLINE void gather_rows(const T* w, int64_t stride, int64_t columns, const T* p, T* z) {
  using V = Vector<T>;
  constexpr int N = kLanes<T>;
  V factors[count];
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) factors[i] = broadcast(p[i]);
  for (int64_t c = 0; c < columns; c += N) {
    V total = load(z + c);
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) total += load(w + i * stride + c) * factors[i];
    store(z + c, total);
  }
}

template <class T, int count> FASTGAN_INLINE void spread_rows(const T* w, int64_t stride, int64_t columns, const T* z, T* y) {
  using V = Vector<T>;
  constexpr int N = kLanes<T>;
  V totals[count];
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) totals[i] = load(y + i * N);
  for (int64_t c = 0; c < columns; c += N) {
    const V x = load(z + c);
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) totals[i] += load(w + i * stride + c) * x;
  }
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) store(y + i * N, totals[i]);
}

template <class T> void wide_tile(const T* w, int64_t stride, int64_t count, int64_t columns, const T* p, T* z, T* y) {
  constexpr int N = kLanes<T>;
  for (int64_t c = 0; c < columns; ++c) z[c] = 0;
  int64_t r = 0;
  for (; r + 8 <= count; r += 8) gather_rows<T, 8>(w + r * stride, stride, columns, p + r, z);
  for (; r < count; ++r) gather_rows<T, 1>(w + r * stride, stride, columns, p + r, z);
  for (r = 0; r + 8 <= count; r += 8) spread_rows<T, 8>(w + r * stride, stride, columns, z, y + r * N);
  for (; r < count; ++r) spread_rows<T, 1>(w + r * stride, stride, columns, z, y + r * N);
}

constexpr int kTileVectors = kTileBytes / kVectorBytes;

template <class T> int64_t tile_vectors(int64_t columns) {
  int64_t vectors = 1;
  while (vectors * kLanes<T> < columns) vectors *= 2;
  return vectors;
}

template <class T> void tile(const T* w, int64_t stride, int64_t count, int64_t vectors, const T* p, T* z, T* y) {
  if (vectors == 1) return tile_of<T, 1>(w, stride, count, p, z, y);
  if (vectors == 2) return tile_of<T, 2>(w, stride, count, p, z, y);
  if (vectors == 4) return tile_of<T, 4>(w, stride, count, p, z, y);
  if constexpr (kTileVectors >= 8)
    if (vectors == 8) return tile_of<T, 8>(w, stride, count, p, z, y);
  if constexpr (kTileVectors >= 16) return tile_of<T, 16>(w, stride, count, p, z, y);
}

template <class T> int64_t lanes() { return kLanes<T>; }

// Rows or columns to a compact matrix of T: for 16-bit weights, and where rows are scattered.
template <class S, class T> void convert(const S* in, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = T(in[i]);
}

template <class S, class T> struct Same { static constexpr bool value = false; };
template <class S> struct Same<S, S> { static constexpr bool value = true; };

// out = s in + k q, without q: out = s in.
template <class S, class T> void combine(const S* in, S* out, int64_t count, T s, T k, const T* q, bool past_caches) {
  int64_t i = 0;
  if constexpr (Same<S, T>::value) {
    constexpr int N = kLanes<T>;
    const Vector<T> factor = broadcast(s), other = broadcast(k);
    if (past_caches && aligned(out)) {
      for (; i + N <= count; i += N) stream(out + i, q ? load(in + i) * factor + load(q + i) * other : load(in + i) * factor);
    } else if (q) {
      for (; i + N <= count; i += N) store(out + i, load(in + i) * factor + load(q + i) * other);
    } else {
      for (; i + N <= count; i += N) store(out + i, load(in + i) * factor);
    }
  }
  if (q)
    for (; i < count; ++i) out[i] = S(T(in[i]) * s + q[i] * k);
  else
    for (; i < count; ++i) out[i] = S(T(in[i]) * s);
}

// In short sums of T, added up in double: the terms have both signs and cancel.
template <class S, class T> double dot(const S* a, const S* b, int64_t count) {
  int64_t i = 0;
  double total = 0;
  if constexpr (Same<S, T>::value) {
    constexpr int N = kLanes<T>;
    constexpr int64_t together = 16 * 4 * N;
    while (i + 4 * N <= count) {
      Vector<T> sums[4] = {};
      for (const int64_t end = i + together < count ? i + together : count; i + 4 * N <= end; i += 4 * N)
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) sums[k] += load(a + i + k * N) * load(b + i + k * N);
      total += sum<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
  }
  for (; i < count; ++i) total += double(T(a[i])) * T(b[i]);
  return total;
}

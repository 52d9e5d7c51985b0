// The loops of minibatch standard deviation, per instruction set. Positions run along vectors; a vector's column of samples is
// read once, and its deviations wait in registers or in the first-level cache for what the column's deviation turns out to be.

// One column of at most a vector of positions.
template <class S, class T, Operator op, int known, class Load, class Store>
FASTGAN_INLINE Vector<T> column(const Columns<S, T>& a, int64_t at, Vector<T>* d, const Load& load, const Store& store) {
  using Flags = Needs<op>;
  const int64_t n = known ? known : a.n;
  Vector<T>* const c = d + n;
  const Vector<T> first = load(a.x.at(0) + at), first_v = Flags::tangent ? load(a.v.at(0) + at) : first;
  Vector<T> mean = {}, mean_v = {};
  for (int64_t i = 0; i < n; ++i) {
    const Vector<T> x = load(a.x.at(i) + at);
    if constexpr (op == Operator::forward) store(a.values.at(i) + at, x);
    mean += d[i] = x - first;
    if constexpr (Flags::tangent) {
      const Vector<T> v = load(a.v.at(i) + at);
      store(a.values.at(i) + at, v);
      mean_v += c[i] = v - first_v;
    }
  }
  mean *= a.inverse_n, mean_v *= a.inverse_n;
  Vector<T> squares = {}, products = {};
  for (int64_t i = 0; i < n; ++i) {
    d[i] -= mean;
    squares += d[i] * d[i];
    if constexpr (Flags::tangent) products += (c[i] -= mean_v) * d[i];
  }
  const Vector<T> sigma = square_root(squares * a.inverse_count + a.eps);
  if constexpr (op == Operator::forward) return sigma;
  const Vector<T> inverse = keep(broadcast(T(1)) / sigma, (Bits<T>)(sigma != Vector<T>{}));
  const Vector<T> value = products * a.inverse_count * inverse;
  if constexpr (Flags::weights) {
    const Vector<T> weight = a.weight * inverse, slope = value * inverse;
    for (int64_t i = 0; i < n; ++i)
      store(a.gradient.at(i) + at, op == Operator::backward ? load(a.grad.at(i) + at) + weight * d[i] : weight * (c[i] - slope * d[i]));
  }
  return value;
}

template <class S, class T, Operator op, int known>
FASTGAN_INLINE double columns_of(const Columns<S, T>& a, int64_t count, void* scratch) {
  constexpr int N = kLanes<T>, spill = 64;
  Vector<T> own[known ? 2 * known : 1];
  Vector<T>* const room = known ? own : static_cast<Vector<T>*>(scratch);
  double total = 0;
  int64_t at = 0;
  while (at + N <= count) {
    Vector<T> some = {};  // few per lane, the rest in double
    for (int64_t end = at + spill * N; at + N <= count && at < end; at += N)
      some += column<S, T, op, known>(
          a, at, room, [](const S* p) { return load_wide(p); }, [](S* p, Vector<T> x) { store_narrow(p, x); });
    total += sum<T>(some);
  }
  if (const int64_t left = count - at) {
    const Vector<T> last = column<S, T, op, known>(
        a, at, room,
        [left](const S* p) {
          S some[N] = {};
          std::memcpy((void*)some, p, left * sizeof(S));
          return load_wide(some);
        },
        [left](S* p, Vector<T> x) {
          S some[N];
          store_narrow(some, x);
          std::memcpy((void*)p, some, left * sizeof(S));
        });
    total += sum<T>(keep(last, first_lanes<T>(left)));
  }
  return total;
}

// Writes count positions of a group and returns what their statistic sums up to.
template <class S, class T, Operator op> double columns(const Columns<S, T>& a, int64_t count, void* scratch) {
  return a.n == 4 ? columns_of<S, T, op, 4>(a, count, scratch) : columns_of<S, T, op, 0>(a, count, scratch);
}

// The loop of tangent_combine, per instruction set.

template <class S, class T>
FASTGAN_INLINE void step(const S* t, const S* a, S* passed, S* combined, Vector<T> factor, Vector<T> slope) {
  const Vector<T> tangent = load_wide(t), activation = load_wide(a);
  const Bits<T> positive = (Bits<T>)(activation > Vector<T>{});
  const Vector<T> pass = from_bits((bits(tangent) & positive) | (bits(tangent * slope) & ~positive));
  store_narrow(passed, pass);
  store_narrow(combined, activation * factor + pass);
}

template <class S, class T>
void combine(const S* t, const S* a, S* passed, S* combined, int64_t count, T factor, T slope) {
  constexpr int N = kLanes<T>;
  const Vector<T> by = broadcast(factor), below = broadcast(slope);
  int64_t i = 0;
  for (; i + N <= count; i += N) step<S, T>(t + i, a + i, passed + i, combined + i, by, below);
  if (i < count) {
    S rest[4][N] = {};
    std::memcpy((void*)rest[0], t + i, (count - i) * sizeof(S));
    std::memcpy((void*)rest[1], a + i, (count - i) * sizeof(S));
    step<S, T>(rest[0], rest[1], rest[2], rest[3], by, below);
    std::memcpy((void*)(passed + i), rest[2], (count - i) * sizeof(S));
    std::memcpy((void*)(combined + i), rest[3], (count - i) * sizeof(S));
  }
}

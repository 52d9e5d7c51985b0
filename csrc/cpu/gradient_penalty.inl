// The loop of the penalty's derivative, per instruction set; sums of squares are simd.inl's.

// out = factor in
template <class S, class T> void scale(const S* in, S* out, int64_t count, T factor, bool past_caches) {
  constexpr int N = kLanes<T>;
  const Vector<T> by = broadcast(factor);
  int64_t i = 0;
  if constexpr (sizeof(S) == sizeof(T)) {
    if (past_caches && aligned(out)) {
      for (; i + N <= count; i += N) stream(out + i, load_wide(in + i) * by);
      end_of_stream();
    }
  }
  for (; i + N <= count; i += N) store_narrow(out + i, load_wide(in + i) * by);
  if (i < count) {
    S rest[N] = {};
    std::memcpy((void*)rest, in + i, (count - i) * sizeof(S));
    store_narrow(rest, load_wide(rest) * by);
    std::memcpy((void*)(out + i), rest, (count - i) * sizeof(S));
  }
}

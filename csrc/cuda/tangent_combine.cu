// tangent_combine on CUDA: fastgan/ops/tangent_combine.py has the formulas. One launch, two reads and two writes.
#include "tangent_combine.h"

#include "cuda.h"

namespace fastgan::tangent_combine {
namespace {

template <class T, int N>
__global__ void __launch_bounds__(kBlock)
    combine(const T* __restrict__ t, const T* __restrict__ a, const typename Accumulate<T>::type* __restrict__ factors,
            T* __restrict__ passed, T* __restrict__ combined, const int64_t t_stride, const int64_t a_stride,
            const int64_t factor_stride, const int64_t out_stride, const int64_t length, const int64_t pieces,
            const typename Accumulate<T>::type slope) {
  using A = typename Accumulate<T>::type;
  const Piece piece(length, pieces);
  const A factor = factors[piece.row * factor_stride];
  t += piece.row * t_stride, a += piece.row * a_stride, passed += piece.row * out_stride, combined += piece.row * out_stride;
  for_each_pack<N>(piece, [&](int64_t at, auto size) {
    constexpr int n = decltype(size)::value;
    const Pack<T, n> tangents = load<n>(t + at), activations = load<n>(a + at);
    Pack<T, n> first, second;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const A tangent = static_cast<A>(tangents.value[i]), activation = static_cast<A>(activations.value[i]);
      const A through = activation > 0 ? tangent : tangent * slope;
      first.value[i] = static_cast<T>(through);
      second.value[i] = static_cast<T>(factor * activation + through);
    }
    store<n>(passed + at, first);
    store<n>(combined + at, second);
  });
}

}  // namespace

void launch(Dtype dtype, Strip t, Strip a, Strip factors, Strip passed, Strip combined, int64_t rows, int64_t length, double slope, Stream stream) {
  const char* op = "tangent_combine";
  const int64_t pieces = pieces_of_row(length);
  if (rows * length == 0) return;
  for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    using A = typename Accumulate<T>::type;
    const bool packed = packs<T>(t, rows) && packs<T>(a, rows) && packs<T>(passed, rows) && packs<T>(combined, rows);
    const auto kernel = packed ? combine<T, kPacked<T>> : combine<T, 1>;
    kernel<<<grid_of(op, rows * pieces), kBlock, 0, stream>>>(t.in<T>(), a.in<T>(), factors.in<A>(), passed.out<T>(), combined.out<T>(), t.stride,
                                                              a.stride, factors.stride, passed.stride, length, pieces, A(slope));
    check_launch(op);
  });
}

}  // namespace fastgan::tangent_combine

// tangent_combine on CUDA: fastgan/ops/tangent_combine.py has the formulas. One launch, two reads and two writes.
#include <tuple>
#include <type_traits>

#include "cuda.h"
#include "device.h"
#include "rows.h"

namespace fastgan {
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

std::tuple<Tensor, Tensor> forward(const Tensor& t, const Tensor& a, const Tensor& factors, double slope) {
  const char* op = "tangent_combine";
  ++calls;
  check_float(op, "t", t);
  STD_TORCH_CHECK(t.dim() > 0, "fastgan::", op, ": t has no dimensions, expected (B, ...)");
  STD_TORCH_CHECK(same_shape(a, t) && a.scalar_type() == t.scalar_type() && a.device() == t.device(), "fastgan::", op,
                  ": a has shape ", shape(a), ", expected one like t, ", shape(t), ", of its dtype and on its device");
  STD_TORCH_CHECK(factors.dim() == 0 || (factors.dim() == 1 && factors.size(0) == t.size(0)), "fastgan::", op, ": factors has shape ",
                  shape(factors), ", expected () or one number for each sample of t, which has shape ", shape(t));
  STD_TORCH_CHECK(factors.scalar_type() == accumulate_dtype(t.scalar_type()) && factors.device() == t.device(), "fastgan::", op,
                  ": factors is ", torch::headeronly::toString(factors.scalar_type()), ", expected a tensor of ",
                  torch::headeronly::toString(accumulate_dtype(t.scalar_type())), " on the device of t");
  const Device device(t);
  Output passed(t), combined(t);
  const Rows tangents = Rows::like(t, passed.work), activations = Rows::like(a, passed.work), first(passed.work), second(combined.work);
  const int64_t pieces = pieces_of_row(first.length);
  if (first.count * first.length)
    for_dtype(dtype_of(t.scalar_type()), [&](auto type) {
      using T = decltype(type);
      using A = typename Accumulate<T>::type;
      bool packed = true;
      for (const Rows* rows : {&tangents, &activations, &first, &second})
        packed = packed && packs(rows->data, rows->stride, rows->count, sizeof(T));
      const auto kernel = packed ? combine<T, kPacked<T>> : combine<T, 1>;
      kernel<<<grid_of(op, first.count * pieces), kBlock, 0, device.stream>>>(
          tangents.in<T>(0), activations.in<T>(0), static_cast<const A*>(factors.const_data_ptr()), first.out<T>(0), second.out<T>(0),
          tangents.stride, activations.stride, factors.dim() ? factors.stride(0) : 0, first.stride, first.length, pieces, A(slope));
      check_launch(op);
    });
  return {passed.finish(), combined.finish()};
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CUDA, library) { library.impl("tangent_combine", TORCH_BOX(&fastgan::forward)); }

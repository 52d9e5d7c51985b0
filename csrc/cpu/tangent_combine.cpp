// tangent_combine on the CPU: fastgan/ops/tangent_combine.py has the formulas. Two reads and two writes.
#include "rows.h"

#include <tuple>

#define FASTGAN_SIMD_SOURCE "tangent_combine.inl"
#include "simd.h"

namespace fastgan {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& t, const Tensor& a, const Tensor& factors, double slope) {
  const char* op = "tangent_combine";
  ++calls;
  check_float(op, "t", t);
  STD_TORCH_CHECK(t.dim() > 0, "fastgan::", op, ": t has no dimensions, expected (B, ...)");
  STD_TORCH_CHECK(same_shape(a, t) && a.scalar_type() == t.scalar_type() && a.is_cpu(), "fastgan::", op, ": a has shape ", shape(a),
                  ", expected one like t, ", shape(t), ", of its dtype and on the CPU");
  STD_TORCH_CHECK(factors.dim() == 0 || (factors.dim() == 1 && factors.size(0) == t.size(0)), "fastgan::", op, ": factors has shape ",
                  shape(factors), ", expected () or one number for each sample of t, which has shape ", shape(t));
  STD_TORCH_CHECK(factors.scalar_type() == accumulate_dtype(t.scalar_type()) && factors.is_cpu(), "fastgan::", op, ": factors is ",
                  torch::headeronly::toString(factors.scalar_type()), ", expected a tensor of ",
                  torch::headeronly::toString(accumulate_dtype(t.scalar_type())), " on the CPU");
  Output passed(t), combined(t);
  const Rows tangents = Rows::like(t, passed.work), activations = Rows::like(a, passed.work), first(passed.work), second(combined.work);
  const int64_t own = factors.dim() ? factors.stride(0) : 0;
  for_dtype(t.scalar_type(), [&](auto type) {
    using S = decltype(type);
    using T = typename AccumulateIn<S>::Type;
    const auto combine = FASTGAN_FOR_ISA(combine<S, T>);
    const T* by = static_cast<const T*>(factors.const_data_ptr());
    for_each_piece(tangents.count, tangents.length, [&](int64_t row, int64_t begin, int64_t end) {
      combine(tangents.in<S>(row) + begin, activations.in<S>(row) + begin, first.out<S>(row) + begin, second.out<S>(row) + begin,
              end - begin, by[row * own], T(slope));
    });
  });
  return {passed.finish(), combined.finish()};
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, library) {
  using namespace fastgan;
  library.impl("tangent_combine", TORCH_BOX(&forward));
}

// tangent_combine on the CPU: fastgan/ops/tangent_combine.py has the formulas. Two reads and two writes.
#include "../tangent_combine.h"

#define FASTGAN_SIMD_SOURCE "tangent_combine.inl"
#include "simd.h"

namespace fastgan {
namespace {

void run(const Rows& t, const Rows& a, const Tensor& factors, int64_t factor_stride, double slope, const Rows& passed, const Rows& combined) {
  for_dtype(t.tensor.scalar_type(), [&](auto type) {
    using S = decltype(type);
    using T = typename AccumulateIn<S>::Type;
    const auto combine = FASTGAN_FOR_ISA(combine<S, T>);
    const T* by = static_cast<const T*>(factors.const_data_ptr());
    for_each_piece(t.count, t.length, [&](int64_t row, int64_t begin, int64_t end) {
      combine(t.in<S>(row) + begin, a.in<S>(row) + begin, passed.out<S>(row) + begin, combined.out<S>(row) + begin, end - begin,
              by[row * factor_stride], T(slope));
    });
  });
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, library) { fastgan::implement(library); }

// tangent_combine in the dispatcher: arguments checked and results made, the same for every device. What includes this defines run().
#pragma once
#include "rows.h"

#include <tuple>

namespace fastgan {
namespace {

// All rows have one length, those of t and a lie like passed's, combined's like passed's too. factor_stride is 0 for one factor.
void run(const Rows& t, const Rows& a, const Tensor& factors, int64_t factor_stride, double slope, const Rows& passed, const Rows& combined);

std::tuple<Tensor, Tensor> forward(const Tensor& t, const Tensor& a, const Tensor& factors, double slope) {
  const char* op = "tangent_combine";
  ++calls;
  check_float(op, "t", t);
  STD_TORCH_CHECK(t.dim() > 0, "fastgan::", op, ": t has no dimensions, expected (B, ...)");
  STD_TORCH_CHECK(same_shape(a, t) && a.scalar_type() == t.scalar_type() && a.device() == t.device(), "fastgan::", op,
                  ": a has shape ", shape(a), ", expected one like t, ", shape(t), ", of its dtype and on its device");
  STD_TORCH_CHECK(factors.dim() == 0 || (factors.dim() == 1 && factors.size(0) == t.size(0)), "fastgan::", op, ": factors has shape ",
                  shape(factors), ", expected () or one number for each sample of t, which has shape ", shape(t));
  check_accumulated(op, "factors", factors, "t", t);
  Output passed(t), combined(t);
  run(Rows::like(t, passed.work), Rows::like(a, passed.work), factors, factors.dim() ? factors.stride(0) : 0, slope, Rows(passed.work),
      Rows(combined.work));
  return {passed.finish(), combined.finish()};
}

template <class Library> void implement(Library& library) { library.impl("tangent_combine", TORCH_BOX(&forward)); }

}  // namespace
}  // namespace fastgan

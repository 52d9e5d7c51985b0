// Gradient penalties in the dispatcher: arguments checked and results made, the same for every device. What includes this defines
// run_forward() and run_backward().
#pragma once
#include "parameters.h"
#include "rows.h"

#include <algorithm>
#include <string>
#include <tuple>

namespace fastgan {
namespace {

// seeds = factors * grads by rows, which lie alike.
void run_forward(const Rows& grads, const Form& form, Tensor& penalty, Tensor& norms, Tensor& factors, const Rows& seeds);
void run_backward(const Rows& grads, const Tensor& factors, const Rows& seeds);

Kind kind_of(const std::string& name) {
  const char* const names[] = {"gradient_penalty", "zero_centered", "power", "max"};
  for (int kind = 0; kind < 4; ++kind)
    if (name == names[kind]) return Kind(kind);
  STD_TORCH_CHECK(false, "fastgan::gradient_penalty: kind is '", name, "', expected one of gradient_penalty, zero_centered, power, max");
  return Kind::max;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& grads, std::string kind, double weight, double target, bool one_sided, double power) {
  const char* op = "gradient_penalty";
  ++calls;
  check_float(op, "grads", grads);
  STD_TORCH_CHECK(grads.dim() > 0, "fastgan::", op, ": grads has no dimensions, expected (N, ...)");
  const int64_t N = grads.size(0);
  const Form form{kind_of(kind), weight, target, one_sided, power, double(std::max<int64_t>(1, N))};
  Output output(grads);
  const ScalarType dtype = accumulate_dtype(grads.scalar_type());
  Tensor penalty = new_tensor(grads, {}, dtype), norms = new_tensor(grads, {N}, dtype);
  Tensor factors = new_tensor(grads, {N}, dtype);
  run_forward(Rows::like(grads, output.work), form, penalty, norms, factors, Rows(output.work));
  return {penalty, norms, factors, output.finish()};
}

Tensor backward(const Tensor& grads, const Tensor& factors) {
  const char* op = "gradient_penalty_backward";
  ++calls;
  check_float(op, "grads", grads);
  STD_TORCH_CHECK(grads.dim() > 0 && factors.dim() == 1 && factors.size(0) == grads.size(0), "fastgan::", op, ": factors has shape ",
                  shape(factors), ", expected one number for each sample of grads, which has shape ", shape(grads));
  check_accumulated(op, "factors", factors, "grads", grads);
  Output output(grads);
  run_backward(Rows::like(grads, output.work), factors, Rows(output.work));
  return output.finish();
}

template <class Library> void implement(Library& library) {
  library.impl("gradient_penalty", TORCH_BOX(&forward));
  library.impl("gradient_penalty_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace fastgan

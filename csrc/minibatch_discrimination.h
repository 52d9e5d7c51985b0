// Minibatch discrimination in the dispatcher: arguments checked and results made, the same for every device. What includes this
// defines run().
#pragma once
#include "common.h"

#include <tuple>

namespace fastgan {
namespace {

enum class Operator { forward, backward, jvp, double_backward };

// m, tangent and gradient are (B, K, D), grad and values (B, K). Null are inputs that the operator doesn't have and outputs that it
// isn't asked for. Outputs are contiguous.
struct Call {
  Operator op;
  const char* name;
  const Tensor& m;
  int64_t B = 0, K = 0, D = 0;
  const Tensor *tangent = nullptr, *grad = nullptr;
  Tensor *values = nullptr, *gradient = nullptr;
  bool self_term = true;

  Call(Operator op, const char* name, const Tensor& m) : op(op), name(name), m(m) {
    STD_TORCH_CHECK(m.dim() == 3, "fastgan::", name, ": m has shape ", shape(m), ", expected (B, K, D)");
    check_float(name, "m", m);
    B = m.size(0), K = m.size(1), D = m.size(2);
  }
  // x has to be like m, or like m without D.
  const Tensor* matching(const char* argument, const Tensor& x, int64_t dims) const {
    bool same = x.dim() == dims;
    for (int64_t dim = 0; same && dim < dims; ++dim) same = x.size(dim) == m.size(dim);
    STD_TORCH_CHECK(same, "fastgan::", name, ": ", argument, " has shape ", shape(x), ", expected ",
                    dims == 3 ? "that of m, " : "the first two dimensions of m, ", shape(m));
    STD_TORCH_CHECK(x.scalar_type() == m.scalar_type(), "fastgan::", name, ": ", argument, " is ",
                    torch::headeronly::toString(x.scalar_type()), ", expected the dtype of m, ",
                    torch::headeronly::toString(m.scalar_type()));
    STD_TORCH_CHECK(x.device() == m.device(), "fastgan::", name, ": ", argument, " and m have to be on one device");
    return &x;
  }
  Tensor new_values() const { return new_tensor(m, {B, K}); }
  Tensor new_gradient() const { return new_tensor(m, {B, K, D}); }
};

void run(const Call& call);

Tensor forward(const Tensor& m, bool self_term) {
  Call call(Operator::forward, "minibatch_discrimination", m);
  Tensor values = call.new_values();
  call.values = &values, call.self_term = self_term;
  run(call);
  return values;
}

Tensor backward(const Tensor& grad, const Tensor& m) {
  Call call(Operator::backward, "minibatch_discrimination_backward", m);
  call.grad = call.matching("grad", grad, 2);
  Tensor gradient = call.new_gradient();
  call.gradient = &gradient;
  run(call);
  return gradient;
}

Tensor jvp(const Tensor& t, const Tensor& m) {
  Call call(Operator::jvp, "minibatch_discrimination_jvp", m);
  call.tangent = call.matching("t", t, 3);
  Tensor values = call.new_values();
  call.values = &values;
  run(call);
  return values;
}

std::tuple<Tensor, Tensor> double_backward(const Tensor& v, const Tensor& grad, const Tensor& m) {
  Call call(Operator::double_backward, "minibatch_discrimination_double_backward", m);
  call.tangent = call.matching("v", v, 3), call.grad = call.matching("grad", grad, 2);
  Tensor values = call.new_values(), gradient = call.new_gradient();
  call.values = &values, call.gradient = &gradient;
  run(call);
  return {values, gradient};
}

template <class Library> void implement(Library& library) {
  library.impl("minibatch_discrimination", TORCH_BOX(&forward));
  library.impl("minibatch_discrimination_backward", TORCH_BOX(&backward));
  library.impl("minibatch_discrimination_jvp", TORCH_BOX(&jvp));
  library.impl("minibatch_discrimination_double_backward", TORCH_BOX(&double_backward));
}

}  // namespace
}  // namespace fastgan

// Spectral norm in the dispatcher: arguments checked and lists of one made of single ones, the same for every device. What includes
// this defines new_sigma(), run_forward() and run_backward().
#pragma once
#include "common.h"
#include "parameters.h"

#include <initializer_list>
#include <tuple>
#include <vector>

namespace fastgan {
namespace {

using Tensors = std::vector<Tensor>;

// Uninitialised, like a u, for the sigmas of a list; without a dimension where the list is that of a single weight.
Tensor new_sigma(const Tensor& u, int64_t count, bool single);

// All of the lists are as long as weights; sigma is contiguous and holds a number for each. u and v are checked and contiguous, dims
// not negative. Nobody reads the first results where iteration.write isn't set.
std::tuple<Tensors, Tensors, Tensors> run_forward(const char* op, const Tensors& weights, const Tensors& u, const Tensors& v,
                                                  const std::vector<int64_t>& dims, Tensor& sigma, const Iteration& iteration, const Target& target);
// A grad is of its weight's shape and dtype.
Tensors run_backward(const char* op, const Tensors& grads, const Tensors& weights, const Tensors& u, const Tensors& v, const Tensor& sigma,
                     const std::vector<int64_t>& dims, const Target& target);

// That u or v is a vector of the right length and dtype; made contiguous where it isn't.
void check_vector(const char* op, const char* name, Tensor& x, const Tensor& weight, int64_t length) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == length, "fastgan::", op, ": ", name, " has shape ", shape(x), ", expected (", length,
                  ",) for a weight of shape ", shape(weight));
  check_accumulated(op, name, x, "weight", weight);
  x = as_contiguous(x);
}

// dims are made not negative.
void check(const char* op, const Tensors& weights, Tensors& u, Tensors& v, std::vector<int64_t>& dims) {
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    check_float(op, "weight", weight);
    STD_TORCH_CHECK(weight.device() == weights[0].device(), "fastgan::", op,
                    ": weights on several devices have to be normalised by a call for each");
    STD_TORCH_CHECK(-weight.dim() <= dims[i] && dims[i] < weight.dim(), "fastgan::", op, ": dim is ", dims[i],
                    ", out of range for a weight of shape ", shape(weight));
    if (dims[i] < 0) dims[i] += weight.dim();
    int64_t columns = 1;
    for (int64_t d = 0; d < weight.dim(); ++d)
      if (d != dims[i]) columns *= weight.size(d);
    check_vector(op, "u", u[i], weight, weight.size(dims[i]));
    check_vector(op, "v", v[i], weight, columns);
  }
}

std::tuple<Tensors, Tensors, Tensors, Tensor> forward_of(const char* op, const Tensors& weights, Tensors u, Tensors v, std::vector<int64_t> dims,
                                                         bool single, const Iteration& iteration, const Target& target) {
  ++calls;
  check(op, weights, u, v, dims);
  Tensor sigma = new_sigma(u[0], weights.size(), single);
  auto [results, us, vs] = run_forward(op, weights, u, v, dims, sigma, iteration, target);
  return {std::move(results), std::move(us), std::move(vs), sigma};
}

Tensors backward_of(const char* op, const Tensors& grads, const Tensors& weights, Tensors u, Tensors v, const Tensor& sigma,
                    std::vector<int64_t> dims, const Target& target) {
  ++calls;
  check(op, weights, u, v, dims);
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor &grad = grads[i], &weight = weights[i];
    STD_TORCH_CHECK(same_shape(grad, weight) && grad.scalar_type() == weight.scalar_type() && grad.device() == weight.device(), "fastgan::", op,
                    ": grad has shape ", shape(grad), ", expected one like weight, ", shape(weight), ", of its dtype and on its device");
    STD_TORCH_CHECK(sigma.scalar_type() == accumulate_dtype(weight.scalar_type()) && sigma.numel() == int64_t(weights.size()) &&
                        sigma.device() == weight.device(),
                    "fastgan::", op, ": sigma has to be of u's dtype, on the device of weight, and hold a number per weight");
  }
  return run_backward(op, grads, weights, u, v, as_contiguous(sigma), dims, target);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& weight, const Tensor& u, const Tensor& v, int64_t dim, int64_t count, double eps,
                                                   bool v_first, double target, bool at_most) {
  auto [results, us, vs, sigma] = forward_of("spectral_norm", {weight}, {u}, {v}, {dim}, true, {count, eps, v_first}, {target, at_most});
  return {results[0], us[0], vs[0], sigma};
}

std::tuple<Tensor, Tensor, Tensor> sigma_of(const Tensor& weight, const Tensor& u, const Tensor& v, int64_t dim, int64_t count, double eps, bool v_first) {
  auto [_, us, vs, sigma] = forward_of("spectral_norm_sigma", {weight}, {u}, {v}, {dim}, true, {count, eps, v_first, false}, {1, false});
  return {us[0], vs[0], sigma};
}

Tensor backward(const Tensor& grad, const Tensor& weight, const Tensor& u, const Tensor& v, const Tensor& sigma, int64_t dim, double target, bool at_most) {
  return backward_of("spectral_norm_backward", {grad}, {weight}, {u}, {v}, sigma, {dim}, {target, at_most})[0];
}

void check_lists(const char* op, size_t weights, std::initializer_list<size_t> others) {
  for (size_t length : others)
    STD_TORCH_CHECK(length == weights, "fastgan::", op, ": there are ", weights, " weights, and lists of other lengths with them: ", length);
  STD_TORCH_CHECK(weights > 0, "fastgan::", op, ": weights is empty, expected one or more");
}

std::tuple<Tensors, Tensors, Tensors, Tensor> multi(Tensors weights, Tensors u, Tensors v, std::vector<int64_t> dims, int64_t count, double eps,
                                                    bool v_first, double target, bool at_most) {
  const char* op = "spectral_norm_multi";
  check_lists(op, weights.size(), {u.size(), v.size(), dims.size()});
  for (const Tensor& x : u)
    STD_TORCH_CHECK(x.scalar_type() == u[0].scalar_type(), "fastgan::", op, ": weights of 64 bits and of fewer have to be normalised by two calls");
  return forward_of(op, weights, std::move(u), std::move(v), std::move(dims), false, {count, eps, v_first}, {target, at_most});
}

Tensors multi_backward(Tensors grads, Tensors weights, Tensors u, Tensors v, Tensor sigma, std::vector<int64_t> dims, double target, bool at_most) {
  const char* op = "spectral_norm_multi_backward";
  check_lists(op, weights.size(), {grads.size(), u.size(), v.size(), dims.size()});
  return backward_of(op, grads, weights, std::move(u), std::move(v), sigma, std::move(dims), {target, at_most});
}

template <class Library> void implement(Library& library) {
  library.impl("spectral_norm", TORCH_BOX(&forward));
  library.impl("spectral_norm_sigma", TORCH_BOX(&sigma_of));
  library.impl("spectral_norm_backward", TORCH_BOX(&backward));
  library.impl("spectral_norm_multi", TORCH_BOX(&multi));
  library.impl("spectral_norm_multi_backward", TORCH_BOX(&multi_backward));
}

}  // namespace
}  // namespace fastgan

// Minibatch standard deviation in the dispatcher: arguments checked and results made, the same for every device. What includes this
// defines run().
#pragma once
#include "common.h"

#include <algorithm>
#include <tuple>
#include <vector>

namespace fastgan {
namespace {

using torch::headeronly::MemoryFormat;

enum class Operator { forward, backward, jvp, double_backward };

MemoryFormat channels_last_of(int64_t dim) { return dim == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast; }

// Does each x[i] lie in this order, however far apart?
bool rows_lie(const Tensor& x, bool channels_last) {
  int64_t run = 1;
  const auto next = [&](int64_t dim) {
    const bool lies = x.size(dim) == 1 || x.stride(dim) == run;
    run *= x.size(dim);
    return lies;
  };
  if (channels_last && !next(1)) return false;
  for (int64_t dim = x.dim() - 1; dim > int64_t(channels_last); --dim)
    if (!next(dim)) return false;
  return true;
}

bool is_channels_last(const Tensor& x) {
  return (x.dim() == 4 || x.dim() == 5) && !x.is_contiguous() && rows_lie(x, true) &&
         (x.size(0) == 1 || x.stride(0) * x.size(0) == x.numel());
}

struct Problem {
  int64_t batch, channels, places, groups, slices;
  bool strided, unbiased, last;
  double eps;

  Problem(const char* op, const Tensor& x, int64_t groups, bool strided, int64_t slices, bool unbiased, double eps)
      : places(1), groups(groups), slices(slices), strided(strided), unbiased(unbiased), eps(eps) {
    check_float(op, "x", x);
    STD_TORCH_CHECK(x.dim() >= 2 && slices >= 1 && x.size(1) >= 1 && x.size(1) % slices == 0, "fastgan::", op, ": x has shape ",
                    shape(x), ", expected (B, C, ...) with C a multiple of num_channels=", slices);
    batch = x.size(0), channels = x.size(1), last = is_channels_last(x);
    for (int64_t dim = 2; dim < x.dim(); ++dim) places *= x.size(dim);
    STD_TORCH_CHECK(groups >= 1 && (batch == 0 || batch >= groups * (1 + unbiased)), "fastgan::", op, ": groups is ", groups,
                    " for a batch of ", batch, ", expected groups of ", 1 + unbiased, " or more");
  }
  int64_t slice() const { return channels / slices; }
  int64_t positions() const { return slice() * places; }
  int64_t samples(int64_t group) const { return batch / groups + (group < batch % groups); }
  int64_t first(int64_t group) const { return strided ? group : group * (batch / groups) + std::min(group, batch % groups); }
  int64_t step() const { return strided ? groups : 1; }

  Tensor output(const Tensor& x, int64_t extra) const {
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end()), strides(sizes.size());
    sizes[1] += extra;
    if (!last) return new_tensor(x, sizes);
    strides[1] = 1;
    int64_t run = sizes[1];
    for (size_t dim = sizes.size() - 1; dim > 1; --dim) strides[dim] = run, run *= sizes[dim];
    strides[0] = run;
    return new_strided(x, x.dim(), sizes.data(), strides.data(), x.scalar_type());
  }
};

// A tensor (B, C or C + F, ...) that lies in the problem's order.
struct Samples {
  Tensor tensor;
  const void* data = nullptr;
  int64_t stride = 0, places = 0, width = 0;
  bool last = false;

  Samples() = default;
  Samples(const Problem& p, const Tensor& x)
      : tensor(rows_lie(x, p.last) ? x : torch::stable::contiguous(x, p.last ? channels_last_of(x.dim()) : MemoryFormat::Contiguous)),
        data(tensor.const_data_ptr()), stride(tensor.stride(0)), places(p.places), width(x.size(1)), last(p.last) {}

  // Of a channel and a place in it.
  int64_t offset(int64_t channel, int64_t place) const { return last ? place * width + channel : channel * places + place; }
  template <class S> const S* in(int64_t sample) const { return static_cast<const S*>(data) + sample * stride; }
  template <class S> S* out(int64_t sample) const { return const_cast<S*>(in<S>(sample)); }
};

// Tensors that the operator doesn't have are without data. v is what is called t in a jvp.
struct Call {
  Operator op;
  const char* name;
  Problem problem;
  Samples x, v, grad, values, gradient;

  void matching(const char* argument, const Tensor& t, const Tensor& like, int64_t extra) const {
    bool same = t.dim() == like.dim();
    for (int64_t dim = 0; same && dim < like.dim(); ++dim) same = t.size(dim) == like.size(dim) + (dim == 1 ? extra : 0);
    STD_TORCH_CHECK(same && t.scalar_type() == like.scalar_type() && t.device() == like.device(), "fastgan::", name, ": ", argument,
                    " has shape ", shape(t), ", expected that of x, ", shape(like), ", with ", extra,
                    " channels more, of its dtype and on its device");
  }
};

void run(const Call& call);

// The outputs that op has: values like grad, gradient like x.
std::tuple<Tensor, Tensor> results(Operator op, const char* name, const Tensor* v, const Tensor* grad, const Tensor& x, int64_t groups,
                                   bool strided, int64_t num_channels, bool unbiased, double eps) {
  ++calls;
  Call call{op, name, Problem(name, x, groups, strided, num_channels, unbiased, eps)};
  const Problem& p = call.problem;
  if (v) call.matching(op == Operator::jvp ? "t" : "v", *v, x, 0);
  if (grad) call.matching("grad", *grad, x, num_channels);
  const Tensor values = op == Operator::backward ? Tensor() : p.output(x, num_channels);
  const Tensor gradient = grad ? p.output(x, 0) : Tensor();
  if (x.numel() == 0) return {values, gradient};
  call.x = Samples(p, x);
  if (v) call.v = Samples(p, *v);
  if (grad) call.grad = Samples(p, *grad), call.gradient = Samples(p, gradient);
  if (op != Operator::backward) call.values = Samples(p, values);
  run(call);
  return {values, gradient};
}

Tensor forward(const Tensor& x, int64_t groups, bool strided, int64_t num_channels, bool unbiased, double eps) {
  const char* name = "minibatch_stddev";
  return std::get<0>(results(Operator::forward, name, nullptr, nullptr, x, groups, strided, num_channels, unbiased, eps));
}

Tensor backward(const Tensor& grad, const Tensor& x, int64_t groups, bool strided, int64_t num_channels, bool unbiased, double eps) {
  const char* name = "minibatch_stddev_backward";
  return std::get<1>(results(Operator::backward, name, nullptr, &grad, x, groups, strided, num_channels, unbiased, eps));
}

Tensor jvp(const Tensor& t, const Tensor& x, int64_t groups, bool strided, int64_t num_channels, bool unbiased, double eps) {
  const char* name = "minibatch_stddev_jvp";
  return std::get<0>(results(Operator::jvp, name, &t, nullptr, x, groups, strided, num_channels, unbiased, eps));
}

std::tuple<Tensor, Tensor> double_backward(const Tensor& v, const Tensor& grad, const Tensor& x, int64_t groups, bool strided,
                                           int64_t num_channels, bool unbiased, double eps) {
  const char* name = "minibatch_stddev_double_backward";
  return results(Operator::double_backward, name, &v, &grad, x, groups, strided, num_channels, unbiased, eps);
}

template <class Library> void implement(Library& library) {
  library.impl("minibatch_stddev", TORCH_BOX(&forward));
  library.impl("minibatch_stddev_backward", TORCH_BOX(&backward));
  library.impl("minibatch_stddev_jvp", TORCH_BOX(&jvp));
  library.impl("minibatch_stddev_double_backward", TORCH_BOX(&double_backward));
}

}  // namespace
}  // namespace fastgan

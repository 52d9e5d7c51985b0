// Minibatch standard deviation on CUDA: the tensors' side.
#include "../minibatch_stddev.h"
#include "device.h"
#include "minibatch_stddev.h"

namespace fastgan {
namespace {

void run(const Call& call) {
  const Problem& p = call.problem;
  const Tensor& x = call.x.tensor;
  const Device device(x);
  const auto samples = [](const Samples& of) { return minibatch_stddev::Samples{of.data, of.stride, of.last ? of.width : 1}; };
  const int64_t run = p.last ? p.slice() : p.positions(), channel = p.last ? 1 : p.places;
  const minibatch_stddev::Problem problem{p.groups,  p.batch / p.groups, p.batch % p.groups, p.slices,  p.places,  p.positions(),
                                          run,       channel,            p.eps,              p.strided, p.unbiased};
  const minibatch_stddev::Tensors tensors{samples(call.x), samples(call.v), samples(call.grad), samples(call.values), samples(call.gradient)};
  const minibatch_stddev::Cut cut(problem, tensors, x.element_size());
  Tensor scratch;
  if (const int64_t count = cut.scratch(problem, tensors)) scratch = new_tensor(x, {count}, ScalarType::Double);
  minibatch_stddev::launch(call.name, dtype_of(x.scalar_type()), problem, tensors, cut,
                           scratch.defined() ? static_cast<double*>(scratch.mutable_data_ptr()) : nullptr, device.stream);
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CUDA, library) { fastgan::implement(library); }

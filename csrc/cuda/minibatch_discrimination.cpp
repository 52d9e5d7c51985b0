// Minibatch discrimination on CUDA: the tensors' side.
#include "../minibatch_discrimination.h"
#include "device.h"
#include "minibatch_discrimination.h"

namespace fastgan {
namespace {

// D of 0 has no components to copy and every distance 0.
void run(const Call& call) {
  ++calls;
  if (call.B * call.K * call.D == 0) {
    if (call.values) torch::stable::fill_(*call.values, call.tangent ? 0 : call.B - !call.self_term);
    return;
  }
  const Tensor m = as_contiguous(call.m);
  const Tensor tangent = call.tangent ? as_contiguous(*call.tangent) : m;
  const Tensor grad = call.grad ? as_contiguous(*call.grad) : m;
  const Device device(m);
  const minibatch_discrimination::Pairs pairs{
      dtype_of(m.scalar_type()), call.B, call.K, call.D, m.const_data_ptr(), call.tangent ? tangent.const_data_ptr() : nullptr,
      call.grad ? grad.const_data_ptr() : nullptr, call.values ? call.values->mutable_data_ptr() : nullptr,
      call.gradient ? call.gradient->mutable_data_ptr() : nullptr, call.self_term};
  const minibatch_discrimination::Cut cut(pairs);
  Tensor scratch = new_tensor(m, {cut.scratch}, ScalarType::Byte);
  minibatch_discrimination::launch(call.name, pairs, cut, scratch.mutable_data_ptr(), device.stream);
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CUDA, library) { fastgan::implement(library); }

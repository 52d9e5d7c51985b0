// Gradient penalties on CUDA: the tensors' side.
#include "../gradient_penalty.h"
#include "device.h"
#include "gradient_penalty.h"

namespace fastgan {
namespace {

void scale(const char* op, const Device& device, const Rows& grads, const Tensor& factors, const Rows& seeds) {
  gradient_penalty::launch_scale(op, dtype_of(grads.tensor.scalar_type()), strip(grads), {factors.const_data_ptr(), factors.stride(0)}, strip(seeds),
                                 grads.count, grads.length, device.stream);
}

void run_forward(const Rows& grads, const Form& form, Tensor& penalty, Tensor& norms, Tensor& factors, const Rows& seeds) {
  const Device device(grads.tensor);
  Tensor sums = new_tensor(grads.tensor, {grads.count * pieces_of_row(grads.length)}, ScalarType::Double);
  gradient_penalty::launch_norms(dtype_of(grads.tensor.scalar_type()), strip(grads), grads.count, grads.length, form,
                                 static_cast<double*>(sums.mutable_data_ptr()), penalty.mutable_data_ptr(), norms.mutable_data_ptr(),
                                 factors.mutable_data_ptr(), device.stream);
  scale("gradient_penalty", device, grads, factors, seeds);
}

void run_backward(const Rows& grads, const Tensor& factors, const Rows& seeds) {
  scale("gradient_penalty_backward", Device(grads.tensor), grads, factors, seeds);
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CUDA, library) { fastgan::implement(library); }

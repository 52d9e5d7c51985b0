// tangent_combine on CUDA: the tensors' side.
#include "../tangent_combine.h"
#include "device.h"
#include "tangent_combine.h"

namespace fastgan {
namespace {

void run(const Rows& t, const Rows& a, const Tensor& factors, int64_t factor_stride, double slope, const Rows& passed, const Rows& combined) {
  tangent_combine::launch(dtype_of(t.tensor.scalar_type()), strip(t), strip(a), {factors.const_data_ptr(), factor_stride}, strip(passed),
                          strip(combined), t.count, t.length, slope, Device(t.tensor).stream);
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CUDA, library) { fastgan::implement(library); }

// The tensors' side of a CUDA operator: where and as what its kernels are launched.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "common.h"
#include "launch.h"
#include "rows.h"

namespace fastgan {

// Of one of kDtypes.
inline Dtype dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::Half: return Dtype::float16;
    default: return Dtype::bfloat16;
  }
}

inline Strip strip(const Rows& rows) { return {rows.data, rows.stride}; }

Stream current_stream(int32_t device);

// The device of a tensor made current, and torch's stream on it.
struct Device {
  torch::stable::accelerator::DeviceGuard guard;
  Stream stream;

  explicit Device(const Tensor& tensor) : guard(tensor.get_device_index()), stream(current_stream(tensor.get_device_index())) {}
};

}  // namespace fastgan

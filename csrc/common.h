// Shared by all native kernels.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace fastgan {

// Instruction sets for CPU kernels, chosen at run time: one binary serves every x86-64 (and, as baseline, any) processor.
enum class Isa { baseline, avx2, avx512 };
Isa isa();

// Counts kernels that ran, so that tests can tell native code from a silent fallback. Every native kernel increments it.
extern std::atomic<int64_t> calls;

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// 16 bits are added up in float.
template <class S> struct AccumulateIn { using Type = float; };
template <> struct AccumulateIn<double> { using Type = double; };
inline ScalarType accumulate_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

constexpr ScalarType kDtypes[] = {ScalarType::Float, ScalarType::Double, ScalarType::Half, ScalarType::BFloat16};

// f(S()) for the S that is dtype, which is one of kDtypes.
template <class F> void for_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::Half: return f(Half());
    default: return f(BFloat16());
  }
}

// Checking arguments: errors name the operator, the argument, what came and what is expected.

inline std::string shape(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) text << (dim ? ", " : "") << tensor.size(dim);
  text << ')';
  return text.str();
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t dim = 0; same && dim < a.dim(); ++dim) same = a.size(dim) == b.size(dim);
  return same;
}

inline void check_float(const char* op, const char* name, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "fastgan::", op, ": ", name, " is ", torch::headeronly::toString(dtype),
                  ", expected a floating-point tensor of 16, 32 or 64 bits");
}

// That x is of the dtype that like is accumulated in, and on like's device.
inline void check_accumulated(const char* op, const char* name, const Tensor& x, const char* like_name, const Tensor& like) {
  const ScalarType dtype = accumulate_dtype(like.scalar_type());
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.device() == like.device(), "fastgan::", op, ": ", name, " is ",
                  torch::headeronly::toString(x.scalar_type()), ", expected a tensor of ", torch::headeronly::toString(dtype),
                  " on the device of ", like_name);
}

// Layout.

// Is each x[i] one run of memory, in whichever order of dimensions?
inline bool has_dense_rows(const Tensor& x) {
  int64_t run = 1, length = 1;
  for (int64_t dim = 1; dim < x.dim(); ++dim) length *= x.size(dim);
  for (int64_t found = 1; length > 1 && run < length && found;) {
    found = 0;
    for (int64_t dim = 1; dim < x.dim(); ++dim)
      if (x.size(dim) > 1 && x.stride(dim) == run) run *= found = x.size(dim);
  }
  return length <= 1 || run == length;
}

// Do the rows of a and b lie alike, however far apart?
inline bool same_rows(const Tensor& a, const Tensor& b) {
  for (int64_t dim = 1; dim < a.dim(); ++dim)
    if (a.size(dim) > 1 && a.stride(dim) != b.stride(dim)) return false;
  return true;
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t dim = 0; dim < a.dim(); ++dim)
    if (a.size(dim) > 1 && a.stride(dim) != b.stride(dim)) return false;
  return true;
}

// Do the elements of x fill one run of memory, in whichever order of dimensions?
inline bool is_dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) != 1) dims.emplace_back(x.stride(d), x.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// New tensors, uninitialised and on the device of x. torch::stable's functions look ATen's operators up by name, which takes
// longer than a small weight.

inline Tensor new_strided(const Tensor& x, int64_t dims, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  int32_t type, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, int32_t(dtype), type, index, &made));
  return Tensor(made);
}

inline Tensor new_tensor(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t run = 1;
  for (size_t d = sizes.size(); d-- > 0; run *= std::max<int64_t>(1, sizes[d])) strides[d] = run;
  return new_strided(x, int64_t(sizes.size()), sizes.data(), strides.data(), dtype);
}
inline Tensor new_tensor(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes) { return new_tensor(x, sizes, x.scalar_type()); }

inline Tensor new_tensor_like(const Tensor& x) {
  if (!is_dense(x)) return torch::stable::empty_like(x);
  return new_strided(x, x.dim(), x.sizes().data(), x.strides().data(), x.scalar_type());
}

inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// x in the layout of like, which is dense.
inline Tensor laid_out_as(const Tensor& x, const Tensor& like) {
  if (same_layout(x, like)) return x;
  Tensor copy = new_tensor_like(like);
  return torch::stable::copy_(copy, x);
}

}  // namespace fastgan

// Spectral norm on CUDA: the tensors' side.
#include "../spectral_norm.h"
#include "device.h"
#include "spectral_norm.h"

namespace fastgan {
namespace {

using namespace spectral_norm;

// Is x stored with its second dimension innermost (channels_last) and without gaps?
bool second_innermost(const Tensor& x) {
  int64_t stride = 1;
  const auto next = [&](int64_t dim) {
    const bool fits = x.size(dim) == 1 || x.stride(dim) == stride;
    stride *= x.size(dim);
    return fits;
  };
  bool fits = x.dim() > 2 && next(1);
  for (int64_t dim = x.dim() - 1; fits && dim > 1; --dim) fits = next(dim);
  return fits && next(0);
}

// A weight, and what is computed for it, in memory that kernels go through: a copy where its own layout isn't one of theirs.
struct Weight {
  Tensor dense, result, work;
  bool transposed;

  Weight(const Tensor& weight, int64_t dim, bool write) {
    transposed = dim == 0 && !weight.is_contiguous() && second_innermost(weight);
    dense = transposed ? weight : as_contiguous(weight);
    if (!write) return;
    result = new_tensor_like(weight);
    work = same_layout(result, dense) ? result : new_tensor(weight, weight.sizes());
  }
  Tensor like_dense(const Tensor& x) const {
    return same_layout(x, dense) ? x : transposed ? laid_out_as(x, dense) : as_contiguous(x);
  }
  Tensor finish() {
    if (work.get() != result.get()) torch::stable::copy_(result, work);
    return result;
  }
  Layer layer(const char* op, int64_t dim) const {
    int64_t rows = dense.size(dim), columns = 1, run = 1;
    for (int64_t d = 0; d < dense.dim(); ++d) {
      if (d != dim) columns *= dense.size(d);
      if (d > dim) run *= dense.size(d);
    }
    STD_TORCH_CHECK(std::max(rows, columns) < (int64_t(1) << 31) - 1024, "fastgan::", op, ": a weight of ", rows, " rows and ", columns,
                    " columns is too long: fewer than 2^31 - 1024 of each are expected");
    Layer layer = {};
    layer.weight = dense.const_data_ptr();
    layer.rows = int32_t(rows), layer.columns = int32_t(columns), layer.run = int32_t(larger(1, run));
    layer.inner = transposed ? int32_t(dense.size(1)) : layer.columns;
    return layer;
  }
};

// Of the layers, those whose weights have this dtype.
std::vector<Layer> of_dtype(ScalarType dtype, const Tensors& weights, const std::vector<Layer>& layers) {
  std::vector<Layer> some;
  for (size_t i = 0; i < weights.size(); ++i)
    if (weights[i].scalar_type() == dtype) some.push_back(layers[i]);
  return some;
}

Tensor new_sigma(const Tensor& u, int64_t count, bool single) {
  return single ? new_tensor(u, {}) : new_tensor(u, {count});
}

std::tuple<Tensors, Tensors, Tensors> run_forward(const char* op, const Tensors& weights, const Tensors& u, const Tensors& v,
                                                  const std::vector<int64_t>& dims, Tensor& sigma, const Iteration& iteration, const Target& target) {
  const Device device(weights[0]);
  const int64_t limit = shared_limit(weights[0].get_device_index());
  std::vector<Weight> each;
  std::vector<Layer> layers;
  std::vector<int64_t> places;
  int64_t room = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    each.emplace_back(weights[i], dims[i], iteration.write);
    layers.push_back(each[i].layer(op, dims[i]));
    choose_tiles(layers[i], iteration.v_first, weights[i].element_size(), limit);
  }
  spread(layers, iteration.v_first);
  for (size_t i = 0; i < weights.size(); ++i) {
    places.push_back(room);
    room += weights[i].element_size() == 8 ? Scratch<double>::bytes(layers[i], iteration.v_first)
                                           : Scratch<float>::bytes(layers[i], iteration.v_first);
  }
  Tensor scratch = new_tensor(weights[0], {room}, ScalarType::Byte);
  Tensors results, new_us, new_vs;
  for (size_t i = 0; i < weights.size(); ++i) {
    new_us.push_back(new_tensor_like(u[i])), new_vs.push_back(new_tensor_like(v[i]));
    Layer& layer = layers[i];
    layer.u = u[i].const_data_ptr(), layer.v = v[i].const_data_ptr();
    layer.new_u = new_us[i].mutable_data_ptr(), layer.new_v = new_vs[i].mutable_data_ptr();
    layer.sigma = static_cast<char*>(sigma.mutable_data_ptr()) + i * sigma.element_size();
    layer.scratch = static_cast<char*>(scratch.mutable_data_ptr()) + places[i];
    if (iteration.write) layer.out = each[i].work.mutable_data_ptr();
  }
  for (ScalarType dtype : kDtypes)
    if (const auto some = of_dtype(dtype, weights, layers); !some.empty())
      launch_forward(op, dtype_of(dtype), some, iteration, target, device.stream);
  if (iteration.write)
    for (Weight& weight : each) results.push_back(weight.finish());
  return {results, new_us, new_vs};
}

Tensors run_backward(const char* op, const Tensors& grads, const Tensors& weights, const Tensors& u, const Tensors& v, const Tensor& sigma,
                     const std::vector<int64_t>& dims, const Target& target) {
  const Device device(weights[0]);
  std::vector<Weight> each;
  std::vector<Layer> layers;
  std::vector<int64_t> places;
  Tensors results, held;
  int64_t room = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    each.emplace_back(weights[i], dims[i], true);
    Layer layer = each[i].layer(op, dims[i]);
    held.push_back(each[i].like_dense(grads[i])), layer.grad = held.back().const_data_ptr();
    layer.u = u[i].const_data_ptr(), layer.v = v[i].const_data_ptr();
    layer.out = each[i].work.mutable_data_ptr();
    layer.sigma = static_cast<char*>(sigma.mutable_data_ptr()) + i * sigma.element_size();  // only read
    layers.push_back(layer), places.push_back(room);
    room += layer.inner_blocks() * int64_t(sizeof(double));
  }
  Tensor scratch = new_tensor(weights[0], {room}, ScalarType::Byte);
  for (size_t i = 0; i < weights.size(); ++i) layers[i].scratch = static_cast<char*>(scratch.mutable_data_ptr()) + places[i];
  for (ScalarType dtype : kDtypes)
    if (const auto some = of_dtype(dtype, weights, layers); !some.empty()) launch_backward(op, dtype_of(dtype), some, target, device.stream);
  for (Weight& weight : each) results.push_back(weight.finish());
  return results;
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CUDA, library) { fastgan::implement(library); }

// Gradient penalties on CUDA: fastgan/ops/gradient_penalty.py has the formulas. Three launches: sums of squares of pieces of
// rows, whose number follows from the shape alone; one block that adds them up in order and does all that comes per sample in
// double; and the product with the factors. No atomics: the same bits on every run.
#include <string>
#include <tuple>
#include <type_traits>

#include "cuda.h"
#include "device.h"
#include "rows.h"

namespace fastgan {
namespace {

enum class Kind { gradient_penalty, zero_centered, power, max };

// The penalty as a function of q, the square of a norm.
struct Form {
  Kind kind;
  double weight, target;
  bool one_sided;
  double power, count;
};

// sums[row, piece]
template <class T, int N>
__global__ void __launch_bounds__(kBlock)
    square_sums(const T* __restrict__ grads, double* __restrict__ sums, const int64_t stride, const int64_t length, const int64_t pieces) {
  using A = typename Accumulate<T>::type;
  const Piece piece(length, pieces);
  grads += piece.row * stride;
  A total = 0;
  for_each_pack<N>(piece, [&](int64_t at, auto size) {
    constexpr int n = decltype(size)::value;
    const Pack<T, n> values = load<n>(grads + at);
#pragma unroll
    for (int i = 0; i < n; ++i) total += static_cast<A>(values.value[i]) * static_cast<A>(values.value[i]);
  });
  const double sum = block_sum(total);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__device__ double square_of(const double* sums, int64_t row, int64_t pieces) {
  double q = 0;
  for (int64_t piece = 0; piece < pieces; ++piece) q += sums[row * pieces + piece];
  return q;
}

// n^power for n >= 0: pow would be a function call.
__device__ double power_of(double n, double power) { return power == 0 ? 1 : exp(power * log(n)); }

// Norms, factors and the penalty; one block.
template <class A>
__global__ void __launch_bounds__(kBlock)
    finish(const double* __restrict__ sums, A* __restrict__ penalty, A* __restrict__ norms, A* __restrict__ factors,
           const int64_t rows, const int64_t pieces, const Form form) {
  __shared__ double shared[kBlock];
  double largest = 0, reached = 0;
  if (form.kind == Kind::max) {
    for (int64_t row = threadIdx.x; row < rows; row += kBlock) {
      const double q = square_of(sums, row, pieces);
      largest = q > largest || q != q ? q : largest;  // NaN stays
    }
    shared[threadIdx.x] = largest;
    __syncthreads();
    for (int i = 0; i < kBlock; ++i) largest = shared[i] > largest || shared[i] != shared[i] ? shared[i] : largest;
    for (int64_t row = threadIdx.x; row < rows; row += kBlock) reached += square_of(sums, row, pieces) == largest;
    const double all = block_sum(reached);
    if (threadIdx.x == 0) shared[0] = all;
    __syncthreads();
    reached = shared[0];
  }
  const double mean = form.weight / form.count;
  double total = 0;
  for (int64_t row = threadIdx.x; row < rows; row += kBlock) {
    const double q = square_of(sums, row, pieces), n = sqrt(q);
    double value = 0, factor = 0;
    if (form.kind == Kind::zero_centered) {
      value = q / 2, factor = mean + q * 0;
    } else if (form.kind == Kind::power) {
      value = power_of(n, form.power), factor = mean * form.power * power_of(n, form.power - 2);
    } else if (form.kind == Kind::max) {
      factor = q == largest ? 2 * form.weight / reached : 0;
    } else {
      const double excess = form.one_sided && n < form.target ? 0 : n - form.target;
      value = excess * excess, factor = 2 * mean * (excess / n);
    }
    total += value;
    norms[row] = static_cast<A>(n);
    factors[row] = static_cast<A>(n == 0 ? 0 : factor);
  }
  const double sum = block_sum(total);
  if (threadIdx.x == 0) *penalty = static_cast<A>(form.kind == Kind::max ? form.weight * largest : mean * sum);
}

template <class T, int N>
__global__ void __launch_bounds__(kBlock)
    scale(const T* __restrict__ grads, const typename Accumulate<T>::type* __restrict__ factors, T* __restrict__ out,
          const int64_t stride, const int64_t factor_stride, const int64_t out_stride, const int64_t length, const int64_t pieces) {
  using A = typename Accumulate<T>::type;
  const Piece piece(length, pieces);
  const A factor = factors[piece.row * factor_stride];
  grads += piece.row * stride, out += piece.row * out_stride;
  for_each_pack<N>(piece, [&](int64_t at, auto size) {
    constexpr int n = decltype(size)::value;
    const Pack<T, n> values = load<n>(grads + at);
    Pack<T, n> scaled;
#pragma unroll
    for (int i = 0; i < n; ++i) scaled.value[i] = static_cast<T>(factor * static_cast<A>(values.value[i]));
    store<n>(out + at, scaled);
  });
}

void launch_scale(const char* op, const Device& device, const Rows& rows, const Tensor& factors, const Rows& out) {
  const int64_t pieces = pieces_of_row(rows.length);
  if (rows.count * rows.length == 0) return;
  for_dtype(dtype_of(out.tensor.scalar_type()), [&](auto type) {
    using T = decltype(type);
    const bool packed = packs(rows.data, rows.stride, rows.count, sizeof(T)) && packs(out.data, out.stride, out.count, sizeof(T));
    const auto kernel = packed ? scale<T, kPacked<T>> : scale<T, 1>;
    kernel<<<grid_of(op, rows.count * pieces), kBlock, 0, device.stream>>>(
        rows.in<T>(0), static_cast<const typename Accumulate<T>::type*>(factors.const_data_ptr()), out.out<T>(0), rows.stride,
        factors.stride(0), out.stride, rows.length, pieces);
    check_launch(op);
  });
}

Kind kind_of(const std::string& name) {
  const char* const names[] = {"gradient_penalty", "zero_centered", "power", "max"};
  for (int kind = 0; kind < 4; ++kind)
    if (name == names[kind]) return Kind(kind);
  STD_TORCH_CHECK(false, "fastgan::gradient_penalty: kind is '", name, "', expected one of gradient_penalty, zero_centered, power, max");
  return Kind::max;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& grads, std::string kind, double weight, double target, bool one_sided, double power) {
  const char* op = "gradient_penalty";
  ++calls;
  check_float(op, "grads", grads);
  STD_TORCH_CHECK(grads.dim() > 0, "fastgan::", op, ": grads has no dimensions, expected (N, ...)");
  const int64_t N = grads.size(0);
  const Form form{kind_of(kind), weight, target, one_sided, power, N > 0 ? double(N) : 1};
  const Device device(grads);
  Output output(grads);
  const Rows rows = Rows::like(grads, output.work), seeds(output.work);
  const int64_t pieces = pieces_of_row(rows.length);
  const ScalarType dtype = accumulate_dtype(grads.scalar_type());
  Tensor penalty = torch::stable::new_empty(grads, {}, dtype), norms = torch::stable::new_empty(grads, {N}, dtype);
  Tensor factors = torch::stable::new_empty(grads, {N}, dtype), sums = torch::stable::new_empty(grads, {N * pieces}, ScalarType::Double);
  for_dtype(dtype_of(grads.scalar_type()), [&](auto type) {
    using T = decltype(type);
    using A = typename Accumulate<T>::type;
    double* of_pieces = static_cast<double*>(sums.mutable_data_ptr());
    if (N) {
      const auto kernel = packs(rows.data, rows.stride, rows.count, sizeof(T)) ? square_sums<T, kPacked<T>> : square_sums<T, 1>;
      kernel<<<grid_of(op, N * pieces), kBlock, 0, device.stream>>>(rows.in<T>(0), of_pieces, rows.stride, rows.length, pieces);
      check_launch(op);
    }
    finish<A><<<1, kBlock, 0, device.stream>>>(of_pieces, static_cast<A*>(penalty.mutable_data_ptr()),
                                                 static_cast<A*>(norms.mutable_data_ptr()), static_cast<A*>(factors.mutable_data_ptr()),
                                                 N, pieces, form);
    check_launch(op);
  });
  launch_scale(op, device, rows, factors, seeds);
  return {penalty, norms, factors, output.finish()};
}

Tensor backward(const Tensor& grads, const Tensor& factors) {
  const char* op = "gradient_penalty_backward";
  ++calls;
  check_float(op, "grads", grads);
  STD_TORCH_CHECK(grads.dim() > 0 && factors.dim() == 1 && factors.size(0) == grads.size(0), "fastgan::", op, ": factors has shape ",
                  shape(factors), ", expected one number for each sample of grads, which has shape ", shape(grads));
  STD_TORCH_CHECK(factors.scalar_type() == accumulate_dtype(grads.scalar_type()) && factors.device() == grads.device(), "fastgan::", op,
                  ": factors is ", torch::headeronly::toString(factors.scalar_type()), ", expected a tensor of ",
                  torch::headeronly::toString(accumulate_dtype(grads.scalar_type())), " on the device of grads");
  const Device device(grads);
  Output output(grads);
  launch_scale(op, device, Rows::like(grads, output.work), factors, Rows(output.work));
  return output.finish();
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CUDA, library) {
  using namespace fastgan;
  library.impl("gradient_penalty", TORCH_BOX(&forward));
  library.impl("gradient_penalty_backward", TORCH_BOX(&backward));
}

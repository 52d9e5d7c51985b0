// Gradient penalties on CUDA: fastgan/ops/gradient_penalty.py has the formulas. Three launches: sums of squares of pieces of
// rows, whose number follows from the shape alone; one block that adds them up in order and does all that comes per sample in
// double; and the product with the factors. No atomics: the same bits on every run.
#include "gradient_penalty.h"

#include "cuda.h"

namespace fastgan::gradient_penalty {
namespace {

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

}  // namespace

void launch_norms(Dtype dtype, Strip grads, int64_t rows, int64_t length, const Form& form, double* sums, void* penalty, void* norms, void* factors,
                  Stream stream) {
  const char* op = "gradient_penalty";
  const int64_t pieces = pieces_of_row(length);
  for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    using A = typename Accumulate<T>::type;
    if (rows) {
      const auto kernel = packs<T>(grads, rows) ? square_sums<T, kPacked<T>> : square_sums<T, 1>;
      kernel<<<grid_of(op, rows * pieces), kBlock, 0, stream>>>(grads.in<T>(), sums, grads.stride, length, pieces);
      check_launch(op);
    }
    finish<A><<<1, kBlock, 0, stream>>>(sums, static_cast<A*>(penalty), static_cast<A*>(norms), static_cast<A*>(factors), rows, pieces, form);
    check_launch(op);
  });
}

void launch_scale(const char* op, Dtype dtype, Strip grads, Strip factors, Strip out, int64_t rows, int64_t length, Stream stream) {
  const int64_t pieces = pieces_of_row(length);
  if (rows * length == 0) return;
  for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    using A = typename Accumulate<T>::type;
    const auto kernel = packs<T>(grads, rows) && packs<T>(out, rows) ? scale<T, kPacked<T>> : scale<T, 1>;
    kernel<<<grid_of(op, rows * pieces), kBlock, 0, stream>>>(grads.in<T>(), factors.in<A>(), out.out<T>(), grads.stride, factors.stride,
                                                              out.stride, length, pieces);
    check_launch(op);
  });
}

}  // namespace fastgan::gradient_penalty

// Gradient penalties on the CPU: fastgan/ops/gradient_penalty.py has the formulas. Forward reads the gradients once, backward
// reads and writes them once; all that comes per sample is arithmetic in double.
#include "rows.h"

#include <cmath>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#define FASTGAN_SIMD_SOURCE "gradient_penalty.inl"
#include "simd.h"

namespace fastgan {
namespace {

constexpr int64_t kPastCaches = 16 << 20;  // bytes above which results are written past the caches

struct Form {
  std::string kind;
  double weight, target;
  bool one_sided;
  double power;
};

// The penalty of N samples; sums (N pieces) of their squares become norms in place, and factors (N) are written.
template <class T> double finish(const Form& form, const std::vector<double>& sums, int64_t pieces, int64_t N, T* norms, T* factors) {
  const double count = std::max<int64_t>(1, N);
  std::vector<double> squares(N);
  for (int64_t i = 0; i < N; ++i)
    for (int64_t j = 0; j < pieces; ++j) squares[i] += sums[i * pieces + j];
  double largest = N ? squares[0] : 0, reached = 0;
  if (form.kind == "max") {
    for (double q : squares) largest = q > largest || std::isnan(q) ? q : largest;
    for (double q : squares) reached += q == largest;
  }
  double total = 0;
  for (int64_t i = 0; i < N; ++i) {
    const double q = squares[i], n = std::sqrt(q);
    double factor;
    if (form.kind == "zero_centered") {
      total += q / 2;
      factor = form.weight / count;
    } else if (form.kind == "max") {
      factor = q == largest ? 2 * form.weight / reached : 0;
    } else if (form.kind == "power") {
      total += std::pow(n, form.power);
      factor = form.weight * form.power / count * std::pow(n, form.power - 2);
    } else {
      double excess = n - form.target;
      if (form.one_sided && excess < 0) excess = 0;
      total += excess * excess;
      factor = 2 * form.weight / count * (excess / n);
    }
    norms[i] = T(n);
    factors[i] = n == 0 ? T(0) : T(factor);
  }
  return form.kind == "max" ? form.weight * largest : form.weight / count * total;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& grads, std::string kind, double weight, double target, bool one_sided, double power) {
  const char* op = "gradient_penalty";
  ++calls;
  check_float(op, "grads", grads);
  STD_TORCH_CHECK(grads.dim() > 0, "fastgan::", op, ": grads has no dimensions, expected (N, ...)");
  STD_TORCH_CHECK(kind == "gradient_penalty" || kind == "zero_centered" || kind == "power" || kind == "max", "fastgan::", op,
                  ": kind is '", kind, "', expected one of gradient_penalty, zero_centered, power, max");
  const Form form{kind, weight, target, one_sided, power};
  const Rows rows = Rows::of(grads);
  const ScalarType dtype = accumulate_dtype(grads.scalar_type());
  const int64_t N = rows.count, pieces = pieces_of(rows.length);
  Tensor penalty = torch::stable::new_empty(grads, {}, dtype), norms = torch::stable::new_empty(grads, {N}, dtype);
  Tensor factors = torch::stable::new_empty(grads, {N}, dtype);
  std::vector<double> sums(N * pieces);
  for_dtype(grads.scalar_type(), [&](auto type) {
    using S = decltype(type);
    using T = typename AccumulateIn<S>::Type;
    const auto squares = FASTGAN_FOR_ISA(squares<S>);
    for_each_piece(N, rows.length, [&](int64_t row, int64_t begin, int64_t end) {
      sums[row * pieces + begin / kPiece] = squares(rows.in<S>(row) + begin, end - begin);
    });
    const double value = finish(form, sums, pieces, N, static_cast<T*>(norms.mutable_data_ptr()), static_cast<T*>(factors.mutable_data_ptr()));
    *static_cast<T*>(penalty.mutable_data_ptr()) = T(value);
  });
  return {penalty, norms, factors};
}

Tensor backward(const Tensor& grads, const Tensor& factors) {
  const char* op = "gradient_penalty_backward";
  ++calls;
  check_float(op, "grads", grads);
  STD_TORCH_CHECK(grads.dim() > 0 && factors.dim() == 1 && factors.size(0) == grads.size(0), "fastgan::", op, ": factors has shape ",
                  shape(factors), ", expected one number for each sample of grads, which has shape ", shape(grads));
  STD_TORCH_CHECK(factors.scalar_type() == accumulate_dtype(grads.scalar_type()) && factors.is_cpu(), "fastgan::", op, ": factors is ",
                  torch::headeronly::toString(factors.scalar_type()), ", expected a tensor of ",
                  torch::headeronly::toString(accumulate_dtype(grads.scalar_type())), " on the CPU");
  Output output(grads);
  const Rows rows = Rows::like(grads, output.work), results(output.work);
  for_dtype(grads.scalar_type(), [&](auto type) {
    using S = decltype(type);
    using T = typename AccumulateIn<S>::Type;
    const auto scale = FASTGAN_FOR_ISA(scale<S, T>);
    const T* by = static_cast<const T*>(factors.const_data_ptr());
    const bool past_caches = rows.count * rows.length * int64_t(sizeof(S)) > kPastCaches;
    for_each_piece(rows.count, rows.length, [&](int64_t row, int64_t begin, int64_t end) {
      scale(rows.in<S>(row) + begin, results.out<S>(row) + begin, end - begin, by[row * factors.stride(0)], past_caches);
    });
  });
  return output.finish();
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, library) {
  using namespace fastgan;
  library.impl("gradient_penalty", TORCH_BOX(&forward));
  library.impl("gradient_penalty_backward", TORCH_BOX(&backward));
}

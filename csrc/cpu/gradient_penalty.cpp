// Gradient penalties on the CPU: fastgan/ops/gradient_penalty.py has the formulas. The gradients are read once, up to what a
// row exceeds the caches by, and written once; all that comes per sample is arithmetic in double.
#include "rows.h"

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#define FASTGAN_SIMD_SOURCE "gradient_penalty.inl"
#include "simd.h"

namespace fastgan {
namespace {

constexpr int64_t kPastCaches = 8 << 20;  // bytes above which results are written past the caches

enum class Kind { gradient_penalty, zero_centered, power, max };

// The penalty as a function of q, the square of a norm.
struct Form {
  Kind kind;
  double weight, target;
  bool one_sided;
  double power, count;
  double largest = 0, reached = 0;  // of max: the largest q, and how many samples have it

  double excess(double n) const { return one_sided && n < target ? 0 : n - target; }
  double value(double q) const {
    if (kind == Kind::zero_centered) return q / 2;
    if (kind == Kind::power) return std::pow(std::sqrt(q), power);
    const double e = excess(std::sqrt(q));
    return e * e;
  }
  double factor(double q) const {
    const double n = std::sqrt(q);
    if (n == 0) return 0;
    if (kind == Kind::zero_centered) return weight / count;
    if (kind == Kind::max) return q == largest ? 2 * weight / reached : 0;
    if (kind == Kind::power) return weight * power / count * std::pow(n, power - 2);
    return 2 * weight / count * (excess(n) / n);
  }
  double penalty(const std::vector<double>& squares) const {
    if (kind == Kind::max) return weight * largest;
    double total = 0;
    for (double q : squares) total += value(q);
    return weight / count * total;
  }
  void look_at(const std::vector<double>& squares) {
    if (kind != Kind::max || squares.empty()) return;
    largest = squares[0];
    for (double q : squares) largest = q > largest || std::isnan(q) ? q : largest;
    for (double q : squares) reached += q == largest;
  }
};

Kind kind_of(const std::string& name) {
  const char* const names[] = {"gradient_penalty", "zero_centered", "power", "max"};
  for (int kind = 0; kind < 4; ++kind)
    if (name == names[kind]) return Kind(kind);
  STD_TORCH_CHECK(false, "fastgan::gradient_penalty: kind is '", name, "', expected one of gradient_penalty, zero_centered, power, max");
  return Kind::max;
}

// A row's sum is that of its pieces in order, whoever adds them up.
template <class S, class T> struct Reduction {
  const Rows &rows, &seeds;
  Form form;
  T *norms, *factors;
  decltype(&baseline::squares<S>) squares = FASTGAN_FOR_ISA(squares<S>);
  decltype(&baseline::scale<S, T>) scale = FASTGAN_FOR_ISA(scale<S, T>);
  bool past_caches = rows.count * rows.length * int64_t(sizeof(S)) > kPastCaches;
  std::vector<double> sums = std::vector<double>(rows.count);

  double square_sum(int64_t row, int64_t begin, int64_t end) const { return squares(rows.in<S>(row) + begin, end - begin); }
  void seed(int64_t row, int64_t begin, int64_t end) const {
    scale(rows.in<S>(row) + begin, seeds.out<S>(row) + begin, end - begin, factors[row], past_caches);
  }
  void finish(int64_t row) { norms[row] = T(std::sqrt(sums[row])), factors[row] = T(form.factor(sums[row])); }

  // Each row is scaled while it is in cache. Of max, no factor is known before all rows have been seen.
  double by_rows() {
    const int64_t grain = 1 + 2 * kPiece / std::max<int64_t>(1, rows.length);
    torch::stable::parallel_for(0, rows.count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t at = 0; at < rows.length; at += kPiece) sums[row] += square_sum(row, at, std::min(rows.length, at + kPiece));
        finish(row);
        for (int64_t at = 0; at < rows.length; at += kPiece) seed(row, at, std::min(rows.length, at + kPiece));
      }
    });
    return form.penalty(sums);
  }
  double by_pieces() {
    const int64_t pieces = pieces_of(rows.length);
    std::vector<double> parts(rows.count * pieces);
    for_each_piece(rows.count, rows.length, [&](int64_t row, int64_t begin, int64_t end) {
      parts[row * pieces + begin / kPiece] = square_sum(row, begin, end);
    });
    for (int64_t i = 0; i < rows.count * pieces; ++i) sums[i / pieces] += parts[i];
    form.look_at(sums);
    for (int64_t row = 0; row < rows.count; ++row) finish(row);
    for_each_piece(rows.count, rows.length, [&](int64_t row, int64_t begin, int64_t end) { seed(row, begin, end); });
    return form.penalty(sums);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& grads, std::string kind, double weight, double target, bool one_sided, double power) {
  const char* op = "gradient_penalty";
  ++calls;
  check_float(op, "grads", grads);
  STD_TORCH_CHECK(grads.dim() > 0, "fastgan::", op, ": grads has no dimensions, expected (N, ...)");
  const int64_t N = grads.size(0);
  const Form form{kind_of(kind), weight, target, one_sided, power, double(std::max<int64_t>(1, N))};
  Output output(grads);
  const Rows rows = Rows::like(grads, output.work), seeds(output.work);
  const ScalarType dtype = accumulate_dtype(grads.scalar_type());
  Tensor penalty = torch::stable::new_empty(grads, {}, dtype), norms = torch::stable::new_empty(grads, {N}, dtype);
  Tensor factors = torch::stable::new_empty(grads, {N}, dtype);
  for_dtype(grads.scalar_type(), [&](auto type) {
    using S = decltype(type);
    using T = typename AccumulateIn<S>::Type;
    Reduction<S, T> reduction{rows, seeds, form, static_cast<T*>(norms.mutable_data_ptr()), static_cast<T*>(factors.mutable_data_ptr())};
    const bool rows_suffice = N >= int64_t(torch::stable::get_num_threads()) && form.kind != Kind::max;
    *static_cast<T*>(penalty.mutable_data_ptr()) = T(rows_suffice ? reduction.by_rows() : reduction.by_pieces());
  });
  return {penalty, norms, factors, output.finish()};
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

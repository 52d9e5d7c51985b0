// Gradient penalties on the CPU: fastgan/ops/gradient_penalty.py has the formulas. The gradients are read once, up to what a
// row exceeds the caches by, and written once; all that comes per sample is arithmetic in double.
#include "../gradient_penalty.h"

#include <cmath>
#include <vector>

#define FASTGAN_SIMD_SOURCE "gradient_penalty.inl"
#include "simd.h"

namespace fastgan {
namespace {

constexpr int64_t kPastCaches = 8 << 20;  // bytes above which results are written past the caches

// The penalty as a function of q, the square of a norm.
struct Penalty : Form {
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

// A row's sum is that of its pieces in order, whoever adds them up.
template <class S, class T> struct Reduction {
  const Rows &rows, &seeds;
  Penalty form;
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

void run_forward(const Rows& grads, const Form& form, Tensor& penalty, Tensor& norms, Tensor& factors, const Rows& seeds) {
  for_dtype(grads.tensor.scalar_type(), [&](auto type) {
    using S = decltype(type);
    using T = typename AccumulateIn<S>::Type;
    Reduction<S, T> reduction{grads, seeds, {form}, static_cast<T*>(norms.mutable_data_ptr()), static_cast<T*>(factors.mutable_data_ptr())};
    const bool rows_suffice = grads.count >= int64_t(torch::stable::get_num_threads()) && form.kind != Kind::max;
    *static_cast<T*>(penalty.mutable_data_ptr()) = T(rows_suffice ? reduction.by_rows() : reduction.by_pieces());
  });
}

void run_backward(const Rows& grads, const Tensor& factors, const Rows& seeds) {
  for_dtype(grads.tensor.scalar_type(), [&](auto type) {
    using S = decltype(type);
    using T = typename AccumulateIn<S>::Type;
    const auto scale = FASTGAN_FOR_ISA(scale<S, T>);
    const T* by = static_cast<const T*>(factors.const_data_ptr());
    const bool past_caches = grads.count * grads.length * int64_t(sizeof(S)) > kPastCaches;
    for_each_piece(grads.count, grads.length, [&](int64_t row, int64_t begin, int64_t end) {
      scale(grads.in<S>(row) + begin, seeds.out<S>(row) + begin, end - begin, by[row * factors.stride(0)], past_caches);
    });
  });
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, library) { fastgan::implement(library); }

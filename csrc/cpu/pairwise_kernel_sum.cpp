// Sums of kernels over pairs on the CPU: packing, distribution over threads, and the dispatcher's side. The arithmetic is in
// pairwise_kernel_sum.inl, once per instruction set.
#include "common.h"
#include "scratch.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

namespace fastgan {
namespace {

enum class Kernel { laplacian, gaussian, rational_quadratic, energy, polynomial };
// Of the distance that the kernel is a function of; 0: of the scalar product.
constexpr int p_of(Kernel kernel) { return kernel == Kernel::laplacian ? 1 : kernel == Kernel::polynomial ? 0 : 2; }

constexpr int kTileRows = 4;
// Points x of one task, and points y whose slopes are kept: these and a few coordinates of either fit the first-level cache.
constexpr int64_t kBlockRows = 32, kColumns = 128;

// sum_b factors_b f(scales_b q), whose f has the exponent and the offset.
template <class T> struct Mixture {
  const T *scales, *factors;
  int64_t count;
  T exponent, offset;
};

// Coordinates as multiples of 1 / scale above the lowest, doubled, and minus their sum.
struct FixedPoint {
  double scale = 0;  // 0: there are none
  const float* lowest = nullptr;
  uint32_t *x = nullptr, *x_sums = nullptr;  // (N, D)
  uint32_t *y = nullptr, *y_sums = nullptr;  // panels
};

template <class T> struct Job {
  int64_t N, M, D, ld;
  bool exclude_diagonal;
  const T *x, *y;       // (N, ld) and (M, ld), zeros from D on; N rounded up to whole tiles
  const T* panels;      // y as pack_panels has it
  const T *row, *column;  // cotangents
  Mixture<T> mixture;
  FixedPoint fixed;
};

}  // namespace
}  // namespace fastgan

#define FASTGAN_SIMD_SOURCE "pairwise_kernel_sum.inl"
#include "simd.h"

namespace fastgan {
namespace {

int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// An odd number of cache lines, lest rows share cache sets, and room for two of the widest vectors at any multiple of them.
template <class T> int64_t row_length(int64_t D) { return round_up(D, 128 / sizeof(T)) + 64 / sizeof(T); }

// x (count, D) in T. -0 becomes +0, which scaled_sign wants.
template <class S, class T> Scratch<T> pack_rows(const Tensor& x, int64_t ld, int64_t count) {
  auto packed = allocate<T>(std::max<int64_t>(1, count * ld));
  const int64_t N = x.size(0), D = x.size(1), stride = x.stride(0), step = x.stride(1);
  const S* from = static_cast<const S*>(x.const_data_ptr());
  torch::stable::parallel_for(0, count, 1 + (1 << 15) / ld, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* to = packed.get() + i * ld;
      const int64_t used = i < N ? D : 0;
      if (step == 1)
        for (int64_t d = 0; d < used; ++d) to[d] = T(from[i * stride + d]) + T(0);
      else
        for (int64_t d = 0; d < used; ++d) to[d] = T(from[i * stride + d * step]) + T(0);
      std::fill(to + used, to + ld, T(0));
    }
  });
  return packed;
}

template <class S, class T> Scratch<T> pack_vector(const Tensor& x, int64_t room) {
  auto packed = allocate<T>(std::max<int64_t>(1, room));
  const S* from = static_cast<const S*>(x.const_data_ptr());
  for (int64_t i = 0; i < room; ++i) packed[i] = i < x.size(0) ? T(from[i * x.stride(0)]) : T(0);
  return packed;
}

// What rounding to a quantum costs a distance, sqrt(D / 6) quanta in the root mean square, may be this part of the smallest
// bandwidth: a quarter of the rounding of a float near 1. Points that spread further, or aren't finite, keep their floats.
constexpr double kRoundOff = 1.0 / (1 << 25);

double fixed_point_scale(const Job<float>& job, double bandwidth, float* lowest) {
  if (isa() == Isa::baseline || job.N == 0 || job.M == 0 || job.D == 0) return 0;
  std::vector<float> highest(job.D, -std::numeric_limits<float>::infinity());
  std::fill_n(lowest, job.D, std::numeric_limits<float>::infinity());
  float not_finite = 0;
  for (const auto& [points, count] : {std::pair(job.x, job.N), std::pair(job.y, job.M)})
    for (int64_t i = 0; i < count; ++i) {
      const float* row = points + i * job.ld;
      for (int64_t d = 0; d < job.D; ++d) {
        lowest[d] = std::min(lowest[d], row[d]);
        highest[d] = std::max(highest[d], row[d]);
        not_finite += row[d] * 0;
      }
    }
  if (not_finite != 0) return 0;
  double spread = 0, widest = 0;
  for (int64_t d = 0; d < job.D; ++d) {
    const double range = double(highest[d]) - double(lowest[d]);
    spread += range, widest = std::max(widest, range);
  }
  const double most = 4294967295.0;
  const double scale = spread > 0 ? std::min((most - 2 * job.D - 2) / spread, (most / 2 - 2) / widest) : 1;
  return std::isfinite(scale) && std::sqrt(job.D / 6.0) <= kRoundOff * bandwidth * scale ? scale : 0;
}

struct Options {
  const Tensor &bandwidths, &weights;
  Kernel kernel;
  double exponent, offset;
  bool exclude_diagonal;
};

template <class T> struct Mixtures {
  std::vector<T> scales, factors;
  double smallest = std::numeric_limits<double>::infinity();
  double exponent, offset;
};

template <class T> Mixtures<T> describe(const Options& options, bool gradient) {
  const auto& [bandwidths, weights, kernel, exponent, offset, _] = options;
  Mixtures<T> made;
  made.offset = kernel == Kernel::polynomial ? offset : kernel == Kernel::rational_quadratic;
  made.exponent = kernel == Kernel::polynomial ? exponent - gradient : -exponent - gradient;
  for (int64_t b = 0; b < bandwidths.size(0); ++b) {
    const double s = static_cast<const T*>(bandwidths.const_data_ptr())[b * bandwidths.stride(0)];
    const double w = static_cast<const T*>(weights.const_data_ptr())[b * weights.stride(0)];
    double scale = 1 / s, factor = w;
    if (kernel == Kernel::laplacian && gradient) factor = -w / s;
    if (kernel == Kernel::gaussian) scale = 1 / (2 * s * s), factor = gradient ? -w / (s * s) : w;
    if (kernel == Kernel::rational_quadratic) scale = 1 / (2 * exponent * s * s), factor = gradient ? -w / (s * s) : w;
    if (kernel == Kernel::energy) factor = -w / s;
    if (kernel == Kernel::polynomial && gradient) factor = w * exponent / s;
    made.scales.push_back(T(scale)), made.factors.push_back(T(factor));
    made.smallest = std::min(made.smallest, s);
  }
  return made;
}

template <class T> using Block = void (*)(const Job<T>&, int64_t, double*);
template <class T, bool gradient> Block<T> block_of(Kernel kernel, bool fixed) {
  switch (kernel) {
    case Kernel::laplacian:
      if constexpr (std::is_same_v<T, float>)
        if (fixed) return FASTGAN_FOR_ISA(block<T, Kernel::laplacian, gradient, true>);
      return FASTGAN_FOR_ISA(block<T, Kernel::laplacian, gradient, false>);
    case Kernel::gaussian: return FASTGAN_FOR_ISA(block<T, Kernel::gaussian, gradient, false>);
    case Kernel::rational_quadratic: return FASTGAN_FOR_ISA(block<T, Kernel::rational_quadratic, gradient, false>);
    case Kernel::energy: return FASTGAN_FOR_ISA(block<T, Kernel::energy, gradient, false>);
    default: return FASTGAN_FOR_ISA(block<T, Kernel::polynomial, gradient, false>);
  }
}

template <class S, bool gradient>
void run(const Tensor* row, const Tensor* column, const Tensor& x, const Tensor& y, const Options& options, S* out) {
  using T = typename AccumulateIn<S>::Type;
  Job<T> job{};
  job.N = x.size(0), job.M = y.size(0), job.D = x.size(1), job.ld = row_length<T>(job.D);
  job.exclude_diagonal = options.exclude_diagonal;
  Mixtures<T> mixture = describe<T>(options, gradient);

  const int64_t lanes = FASTGAN_FOR_ISA(kPanel<T>), panels = (job.M + lanes - 1) / lanes, whole = round_up(job.N, kTileRows);
  const auto xs = pack_rows<S, T>(x, job.ld, whole), ys = pack_rows<S, T>(y, job.ld, job.M);
  job.x = xs.get(), job.y = ys.get();
  Scratch<T> rows, columns;
  if constexpr (gradient) {
    rows = pack_vector<S, T>(*row, whole), columns = pack_vector<S, T>(*column, panels * lanes);
    job.row = rows.get(), job.column = columns.get();
  }
  const int64_t grain = 1 + (1 << 15) / (1 + lanes * job.D);
  Scratch<uint32_t> integers;
  std::vector<float> lowest;
  if constexpr (std::is_same_v<T, float>)
    if (options.kernel == Kernel::laplacian) {
      lowest.resize(job.D);
      job.fixed.lowest = lowest.data();
      job.fixed.scale = fixed_point_scale(job, mixture.smallest, lowest.data());
    }
  Scratch<T> packed;
  if (job.fixed.scale > 0) {
    integers = allocate<uint32_t>(whole * (job.D + 1) + panels * lanes * (job.D + 1));
    job.fixed.x = integers.get(), job.fixed.x_sums = job.fixed.x + whole * job.D;
    job.fixed.y = job.fixed.x_sums + whole, job.fixed.y_sums = job.fixed.y + panels * lanes * job.D;
    for (auto& scale : mixture.scales) scale = T(2 * double(scale) / job.fixed.scale);
    torch::stable::parallel_for(0, whole, grain * lanes, [&](int64_t begin, int64_t end) { FASTGAN_FOR_ISA(pack_fixed_rows<T>)(job, begin, end); });
    torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) { FASTGAN_FOR_ISA(pack_fixed_panels<T>)(job, begin, end); });
  } else {
    packed = allocate<T>(std::max<int64_t>(1, panels * lanes * job.D));
    job.panels = packed.get();
    torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
      FASTGAN_FOR_ISA(pack_panels<T>)(ys.get(), job.ld, job.M, job.D, begin, end, packed.get());
    });
  }
  job.mixture = {mixture.scales.data(), mixture.factors.data(), int64_t(mixture.scales.size()), T(mixture.exponent), T(mixture.offset)};

  const Block<T> block = block_of<T, gradient>(options.kernel, job.fixed.scale > 0);
  const double sign = options.kernel == Kernel::laplacian ? double(FASTGAN_FOR_ISA(kSign<T>)) : 1;
  const int64_t blocks = (job.N + kBlockRows - 1) / kBlockRows, size = gradient ? kBlockRows * job.ld : kBlockRows;
  torch::stable::parallel_for(0, blocks, 1 + (1 << 18) / (1 + kBlockRows * job.M * (job.D + 8)), [&](int64_t begin, int64_t end) {
    const auto totals = allocate<double>(size);
    for (int64_t b = begin; b < end; ++b) {
      std::fill_n(totals.get(), size, 0.0);
      block(job, b * kBlockRows, totals.get());
      for (int64_t i = b * kBlockRows; i < std::min(job.N, (b + 1) * kBlockRows); ++i)
        if constexpr (gradient)
          for (int64_t d = 0; d < job.D; ++d) out[i * job.D + d] = S(T(totals[i % kBlockRows * job.ld + d] / sign));
        else
          out[i] = S(T(totals[i % kBlockRows]));
    }
  });
}

Options check(const char* op, const Tensor& x, const Tensor& y, const Tensor& bandwidths, const Tensor& weights, const std::string& kernel,
              double exponent, double offset, bool exclude_diagonal) {
  ++calls;
  const char* const names[] = {"laplacian", "gaussian", "rational_quadratic", "energy", "polynomial"};
  int found = 0;
  while (found < 5 && kernel != names[found]) ++found;
  STD_TORCH_CHECK(found < 5, "fastgan::", op, ": kernel is '", kernel, "', expected one of laplacian, gaussian, rational_quadratic, energy, polynomial");
  check_float(op, "x", x);
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1), "fastgan::", op, ": x has shape ", shape(x), " and y ", shape(y),
                  ", expected (N, D) and (M, D)");
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type() && x.is_cpu() && y.is_cpu(), "fastgan::", op,
                  ": x and y have to be of one dtype and on the CPU both");
  for (const Tensor* each : {&bandwidths, &weights})
    STD_TORCH_CHECK(each->dim() == 1 && each->size(0) == bandwidths.size(0) && each->is_cpu() &&
                        each->scalar_type() == accumulate_dtype(x.scalar_type()),
                    "fastgan::", op, ": bandwidths and weights have shapes ", shape(bandwidths), " and ", shape(weights),
                    ", expected (n,) of both, on the CPU, of dtype ", torch::headeronly::toString(accumulate_dtype(x.scalar_type())));
  STD_TORCH_CHECK(!exclude_diagonal || x.size(0) == y.size(0), "fastgan::", op, ": x has shape ", shape(x), " and y ", shape(y),
                  ", expected as many points in both where the diagonal is left out");
  return {bandwidths, weights, Kernel(found), exponent, offset, exclude_diagonal};
}

Tensor forward(const Tensor& x, const Tensor& y, const Tensor& bandwidths, const Tensor& weights, std::string kernel, double exponent, double offset,
               bool exclude_diagonal) {
  const Options options = check("pairwise_kernel_sum", x, y, bandwidths, weights, kernel, exponent, offset, exclude_diagonal);
  Tensor out = torch::stable::new_empty(x, {x.size(0)});
  for_dtype(x.scalar_type(), [&](auto type) {
    using S = decltype(type);
    run<S, false>(nullptr, nullptr, x, y, options, static_cast<S*>(out.mutable_data_ptr()));
  });
  return out;
}

Tensor backward(const Tensor& row, const Tensor& column, const Tensor& x, const Tensor& y, const Tensor& bandwidths, const Tensor& weights,
                std::string kernel, double exponent, double offset, bool exclude_diagonal) {
  const char* op = "pairwise_kernel_sum_backward";
  const Options options = check(op, x, y, bandwidths, weights, kernel, exponent, offset, exclude_diagonal);
  STD_TORCH_CHECK(row.dim() == 1 && row.size(0) == x.size(0) && column.dim() == 1 && column.size(0) == y.size(0), "fastgan::", op,
                  ": row has shape ", shape(row), " and column ", shape(column), ", expected a number for each point of x, ", shape(x), ", and of y, ",
                  shape(y));
  STD_TORCH_CHECK(row.scalar_type() == x.scalar_type() && column.scalar_type() == x.scalar_type() && row.is_cpu() && column.is_cpu(), "fastgan::", op,
                  ": row and column have to be of the dtype of x and on the CPU");
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  for_dtype(x.scalar_type(), [&](auto type) {
    using S = decltype(type);
    run<S, true>(&row, &column, x, y, options, static_cast<S*>(out.mutable_data_ptr()));
  });
  return out;
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, library) {
  using namespace fastgan;
  library.impl("pairwise_kernel_sum", TORCH_BOX(&forward));
  library.impl("pairwise_kernel_sum_backward", TORCH_BOX(&backward));
}

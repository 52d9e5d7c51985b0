// Sums of kernels over pairs on the CPU: packing, distribution over threads, and the dispatcher's side. The arithmetic is in
// pairwise_kernel_sum.inl, once per instruction set.
#include "common.h"
#include "scratch.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace fastgan {
namespace {

enum class Kernel { laplacian, gaussian, rational_quadratic, energy, polynomial };
// Of the distance that the kernel is a function of; 0: of the scalar product.
constexpr int p_of(Kernel kernel) { return kernel == Kernel::laplacian ? 1 : kernel == Kernel::polynomial ? 0 : 2; }

constexpr int kTileRows = 4;
// Points x of one task, at most, and points y whose slopes are kept: these and a few coordinates of either fit the first-level
// cache.
constexpr int64_t kBlockRows = 64, kColumns = 128;

// Where scalar products are matrix products: from so many coordinates and points of either kind on (measured), in tiles of so many
// pairs, an odd number of cache lines a row.
constexpr int64_t kProductsFrom = 64, kProductPointsFrom = 512;
constexpr int64_t kProductRows = 512, kProductColumns = 512, kProductStride = kProductColumns + 16;
// Pairs whose squared distance is at most this part of the sum of their points' squared norms are close: scalar products would cancel
// most of it.
constexpr double kClose = 0.125;

enum class Sweep { forward, with_gradient, backward, both };

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

// For matrix products: the points, centred where the kernel is one of distances, and their squared norms then.
template <class T> struct Products {
  const T *x, *y;                  // (N, ld) and (M, ld)
  const T *x_squares, *y_squares;  // filled up to whole tiles
};

template <class T> struct Job {
  int64_t N, M, D, ld;
  bool exclude_diagonal;
  const T *x, *y;         // (N, ld) and (M, ld), zeros from D on; N rounded up to whole tiles
  const T* panels;        // y as pack_panels has it
  const T *row, *column;  // cotangents
  Mixture<T> values, slopes;
  FixedPoint fixed;
  Products<T> products;
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

// x (count,) in T, then zeros; zeros alone where there is no x.
template <class S, class T> Scratch<T> pack_vector(const Tensor* x, int64_t room) {
  auto packed = allocate<T>(std::max<int64_t>(1, room));
  const S* from = x ? static_cast<const S*>(x->const_data_ptr()) : nullptr;
  for (int64_t i = 0; i < room; ++i) packed[i] = from && i < x->size(0) ? T(from[i * x->stride(0)]) : T(0);
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

  Mixture<T> view() const { return {scales.data(), factors.data(), int64_t(scales.size()), T(exponent), T(offset)}; }
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

template <class T> using Block = void (*)(const Job<T>&, int64_t, int64_t, double*, double*, double*, T*);
template <class T, Sweep sweep> Block<T> block_of(Kernel kernel, bool fixed) {
  switch (kernel) {
    case Kernel::laplacian:
      if constexpr (std::is_same_v<T, float>)
        if (fixed) return FASTGAN_FOR_ISA(block<T, Kernel::laplacian, sweep, true>);
      return FASTGAN_FOR_ISA(block<T, Kernel::laplacian, sweep, false>);
    case Kernel::gaussian: return FASTGAN_FOR_ISA(block<T, Kernel::gaussian, sweep, false>);
    case Kernel::rational_quadratic: return FASTGAN_FOR_ISA(block<T, Kernel::rational_quadratic, sweep, false>);
    case Kernel::energy: return FASTGAN_FOR_ISA(block<T, Kernel::energy, sweep, false>);
    default: return FASTGAN_FOR_ISA(block<T, Kernel::polynomial, sweep, false>);
  }
}

// Both gradients in one sweep: a task is a stripe of blocks, with sums of its own for y, which are added in order. How many stripes
// follows from the shape alone, so results don't depend on the number of threads.
int64_t count_stripes(int64_t blocks, int64_t bytes) {
  constexpr int64_t kStripes = 8, kBytes = 256 << 20;
  return std::max<int64_t>(1, std::min({kStripes, blocks / 2, kBytes / std::max<int64_t>(1, bytes)}));
}

// Squared distances by matrix product are |a|^2 + |b|^2 - 2 a.b of centred points, with an error of some eps (|a|^2 + |b|^2). Close
// pairs, which that is too much for, are told by the result and taken from differences, slopes and all; the others have an error of
// eps / kClose at most. Every bandwidth, coincident points and the energy kernel's pole at 0 are then as exact as by differences
// alone. Worth it where few pairs are close: a sample of them tells.
template <class T> struct Centred {
  Scratch<T> x, y, x_squares, y_squares;

  Products<T> view() const { return {x.get(), y.get(), x_squares.get(), y_squares.get()}; }
};

template <class T> bool centre(const Job<T>& job, int64_t whole, Centred<T>& centred) {
  std::vector<double> mean(job.D);
  for (int64_t j = 0; j < job.M; ++j)
    for (int64_t d = 0; d < job.D; ++d) mean[d] += job.y[j * job.ld + d];
  for (double& each : mean) each /= job.M;
  const auto move = [&](const T* from, int64_t count, int64_t room, Scratch<T>& to, Scratch<T>& squares) {
    to = allocate<T>(room * job.ld), squares = allocate<T>(room + 2 * 64 / sizeof(T));
    std::fill_n(squares.get() + count, room + 2 * 64 / sizeof(T) - count, T(0));
    std::fill_n(to.get() + count * job.ld, (room - count) * job.ld, T(0));
    torch::stable::parallel_for(0, count, 1 + (1 << 15) / job.ld, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double sums[4] = {};
        T *const row = to.get() + i * job.ld;
        for (int64_t d = 0; d < job.D; ++d) {
          row[d] = T(from[i * job.ld + d] - mean[d]);
          sums[d % 4] += double(row[d]) * row[d];
        }
        std::fill(row + job.D, row + job.ld, T(0));
        squares[i] = T(sums[0] + sums[1] + sums[2] + sums[3]);
      }
    });
    T total = 0;
    for (int64_t i = 0; i < count; ++i) total += squares[i];
    return total < std::numeric_limits<T>::max() / 8;  // not if there is a NaN
  };
  if (!move(job.x, job.N, whole, centred.x, centred.x_squares) || !move(job.y, job.M, job.M, centred.y, centred.y_squares)) return false;
  constexpr int64_t kSample = 32;
  int64_t close = 0;
  for (int64_t k = 0; k < kSample; ++k)
    for (int64_t l = 0; l < kSample; ++l) {
      const int64_t i = k * job.N / kSample, j = (2 * l + 1) * job.M / (2 * kSample);
      double square = 0;
      for (int64_t d = 0; d < job.D; ++d) {
        const double difference = centred.x[i * job.ld + d] - centred.y[j * job.ld + d];
        square += difference * difference;
      }
      close += square < kClose * (centred.x_squares[i] + centred.y_squares[j]);
    }
  return close <= kSample * kSample / 16;
}

struct Matrix {
  const void* data;
  int64_t rows, columns, row_stride, column_stride;

  Tensor tensor(ScalarType dtype) const {
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::from_blob(const_cast<void*>(data), {rows, columns}, {row_stride, column_stride}, cpu, dtype);
  }
};

// out = a b, or that added to it. ATen's kernel itself, past the dispatcher: no mode of the calling thread is asked, but for
// torch.set_float32_matmul_precision.
template <class T> void product(const Matrix& a, const Matrix& b, const Matrix& out, bool add) {
  constexpr ScalarType dtype = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const Tensor left = a.tensor(dtype), right = b.tensor(dtype), result = out.tensor(dtype);
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(result.get(), result.get(), left.get(), right.get(), add, 1));
}

template <class T> using ProductTile = void (*)(const Job<T>&, int64_t, int64_t, int64_t, int64_t, T*, double*, double*, T*, double*, T*);
template <class T, Sweep sweep> ProductTile<T> product_tile_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::gaussian: return FASTGAN_FOR_ISA(product_tile<T, Kernel::gaussian, sweep>);
    case Kernel::rational_quadratic: return FASTGAN_FOR_ISA(product_tile<T, Kernel::rational_quadratic, sweep>);
    case Kernel::energy: return FASTGAN_FOR_ISA(product_tile<T, Kernel::energy, sweep>);
    default: return FASTGAN_FOR_ISA(product_tile<T, Kernel::polynomial, sweep>);
  }
}

// A task, on one thread with its products, is a block of points x or, where both gradients are wanted, a stripe of blocks. Where the
// points y are too large for several stripes there is one, whose products are threaded by themselves.
template <class S, class T, Sweep sweep> void run_products(const Job<T>& job, Kernel kernel, void* out, void* out_x, void* out_y) {
  constexpr bool gradient = sweep != Sweep::forward, both = sweep == Sweep::both;
  using G = std::conditional_t<sweep == Sweep::with_gradient, T, S>;
  const T *const x = job.products.x, *const y = job.products.y;
  const bool distances = p_of(kernel) == 2;
  const ProductTile<T> evaluate = product_tile_of<T, sweep>(kernel);
  const int64_t D = job.D, ld = job.ld, size = std::min(kProductRows, round_up(job.N / 16 + 1, kTileRows));
  const int64_t blocks = (job.N + size - 1) / size;
  const int64_t y_size = job.M * ld, stripes = both ? count_stripes(blocks, y_size * sizeof(T)) : blocks;
  const auto all_sums_y = allocate<T>(both ? y_size * stripes : 1);
  const auto all_slopes_y = allocate<double>(both ? job.M * stripes : 1);
  // What the slopes make of a point, given their sum and the sum of the others times theirs.
  const auto write = [&](void* to, int64_t at, double slopes, const T* point, const double* sum_of, const T* sum) {
    for (int64_t d = 0; d < D; ++d) {
      const double total = sum_of ? sum_of[d] : sum[d];
      static_cast<G*>(to)[at * D + d] = G(T(distances ? slopes * point[d] - total : total));
    }
  };
  torch::stable::parallel_for(0, stripes, 1, [&](int64_t begin, int64_t end) {
    const auto tile = allocate<T>(size * kProductStride), sums = allocate<T>(gradient ? size * ld : 1);
    const auto values = allocate<double>(2 * size);
    double* const slopes = values.get() + size;
    for (int64_t stripe = begin; stripe < end; ++stripe) {
      T* const sums_y = both ? all_sums_y.get() + y_size * stripe : nullptr;
      double* const slopes_y = both ? all_slopes_y.get() + job.M * stripe : nullptr;
      if (both) std::fill_n(sums_y, y_size, T(0)), std::fill_n(slopes_y, job.M, 0.0);
      for (int64_t b = stripe; b < blocks; b += stripes) {
        const int64_t i0 = b * size, count = std::min(size, job.N - i0), rows = round_up(count, kTileRows);
        std::fill_n(values.get(), 2 * size, 0.0);
        if (gradient) std::fill_n(sums.get(), rows * ld, T(0));
        for (int64_t j0 = 0; j0 < job.M; j0 += kProductColumns) {
          const int64_t columns = std::min(kProductColumns, job.M - j0);
          const Matrix pairs{tile.get(), rows, columns, kProductStride, 1};
          product<T>({x + i0 * ld, rows, D, ld, 1}, {y + j0 * ld, D, columns, 1, ld}, pairs, false);
          evaluate(job, i0, rows, j0, columns, tile.get(), values.get(), slopes, sums.get(), slopes_y, sums_y);
          if (gradient) product<T>(pairs, {y + j0 * ld, columns, D, ld, 1}, {sums.get(), rows, D, ld, 1}, true);
          if (both) product<T>({tile.get(), columns, rows, 1, kProductStride}, {x + i0 * ld, rows, D, ld, 1}, {sums_y + j0 * ld, columns, D, ld, 1}, true);
        }
        for (int64_t i = 0; i < count; ++i) {
          if (out) static_cast<S*>(out)[i0 + i] = S(T(values[i]));
          if (gradient) write(out_x, i0 + i, slopes[i], x + (i0 + i) * ld, nullptr, sums.get() + i * ld);
        }
      }
    }
  });
  if (both)
    torch::stable::parallel_for(0, job.M, 1 + (1 << 15) / (1 + D * stripes), [&](int64_t begin, int64_t end) {
      std::vector<double> totals(D);
      for (int64_t j = begin; j < end; ++j) {
        double slopes = 0;
        std::fill(totals.begin(), totals.end(), 0.0);
        for (int64_t stripe = 0; stripe < stripes; ++stripe) {
          slopes += all_slopes_y[job.M * stripe + j];
          for (int64_t d = 0; d < D; ++d) totals[d] += all_sums_y[y_size * stripe + j * ld + d];
        }
        write(out_y, j, slopes, y + j * ld, totals.data(), nullptr);
      }
    });
}

template <class S, Sweep sweep>
void run(const Tensor* row, const Tensor* column, const Tensor& x, const Tensor& y, const Options& options, void* out, void* out_x, void* out_y) {
  constexpr bool gradient = sweep != Sweep::forward, both = sweep == Sweep::both;
  using T = typename AccumulateIn<S>::Type;
  Job<T> job{};
  job.N = x.size(0), job.M = y.size(0), job.D = x.size(1), job.ld = row_length<T>(job.D);
  job.exclude_diagonal = options.exclude_diagonal;
  Mixtures<T> values = describe<T>(options, false), slopes = describe<T>(options, true);

  const int64_t lanes = FASTGAN_FOR_ISA(kPanel<T>), panels = (job.M + lanes - 1) / lanes, whole = round_up(job.N, kTileRows);
  const auto xs = pack_rows<S, T>(x, job.ld, whole), ys = pack_rows<S, T>(y, job.ld, job.M);
  job.x = xs.get(), job.y = ys.get();
  Scratch<T> rows, columns;
  if constexpr (sweep == Sweep::backward || both) {
    rows = pack_vector<S, T>(row, whole), columns = pack_vector<S, T>(column, panels * lanes);
    job.row = rows.get(), job.column = columns.get();
  }
  job.values = values.view(), job.slopes = slopes.view();
  if (options.kernel != Kernel::laplacian && job.D >= kProductsFrom && std::min(job.N, job.M) >= kProductPointsFrom) {
    job.products = {xs.get(), ys.get(), nullptr, nullptr};
    Centred<T> centred;
    const bool distances = p_of(options.kernel) == 2;
    if (!distances || centre(job, whole, centred)) {
      if (distances) job.products = centred.view();
      return run_products<S, T, sweep>(job, options.kernel, out, out_x, out_y);
    }
  }
  const int64_t grain = 1 + (1 << 15) / (1 + lanes * job.D);
  Scratch<uint32_t> integers;
  std::vector<float> lowest;
  if constexpr (std::is_same_v<T, float>)
    if (options.kernel == Kernel::laplacian) {
      lowest.resize(job.D);
      job.fixed.lowest = lowest.data();
      job.fixed.scale = fixed_point_scale(job, values.smallest, lowest.data());
    }
  Scratch<T> packed;
  if (job.fixed.scale > 0) {
    integers = allocate<uint32_t>((whole + panels * lanes) * (job.D + 1));
    job.fixed.x = integers.get(), job.fixed.x_sums = job.fixed.x + whole * job.D;
    job.fixed.y = job.fixed.x_sums + whole, job.fixed.y_sums = job.fixed.y + panels * lanes * job.D;
    for (auto* mixture : {&values, &slopes})
      for (auto& scale : mixture->scales) scale = T(2 * double(scale) / job.fixed.scale);
    torch::stable::parallel_for(0, whole, grain * lanes, [&](int64_t begin, int64_t end) { FASTGAN_FOR_ISA(pack_fixed_rows<T>)(job, begin, end); });
    torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) { FASTGAN_FOR_ISA(pack_fixed_panels<T>)(job, begin, end); });
  } else {
    packed = allocate<T>(std::max<int64_t>(1, panels * lanes * job.D));
    job.panels = packed.get();
    torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
      FASTGAN_FOR_ISA(pack_panels<T>)(ys.get(), job.ld, job.M, job.D, begin, end, packed.get());
    });
  }
  const Block<T> block = block_of<T, sweep>(options.kernel, job.fixed.scale > 0);
  const double sign = options.kernel == Kernel::laplacian ? double(FASTGAN_FOR_ISA(kSign<T>)) : 1;
  // Few points make small blocks, for several threads to have some.
  const int64_t size = std::min(kBlockRows, round_up(job.N / 16 + 1, kTileRows)), blocks = (job.N + size - 1) / size;
  const int64_t y_size = job.M * job.ld, stripes = both ? count_stripes(blocks, y_size * sizeof(double)) : blocks;
  Scratch<double> totals_y;
  if (both) totals_y = allocate<double>(std::max<int64_t>(1, y_size * stripes));
  using G = std::conditional_t<sweep == Sweep::with_gradient, T, S>;
  const auto write = [&](void* to, int64_t at, double total) { static_cast<G*>(to)[at] = G(T(total / sign)); };
  torch::stable::parallel_for(0, stripes, 1 + (1 << 18) / (1 + size * job.M * (job.D + 8)), [&](int64_t begin, int64_t end) {
    const int64_t room = gradient ? kBlockRows * job.ld : 0;
    const auto totals = allocate<double>(kBlockRows + room);
    const auto sums_y = allocate<T>(both ? kColumns * job.ld : 1);
    double *const sums = totals.get(), *const gradients = sums + kBlockRows;
    for (int64_t stripe = begin; stripe < end; ++stripe) {
      double* own_y = both ? totals_y.get() + y_size * stripe : nullptr;
      if (both) std::fill_n(own_y, y_size, 0.0);
      for (int64_t b = stripe; b < blocks; b += stripes) {
        const int64_t i0 = b * size, count = std::min(size, job.N - i0);
        std::fill_n(sums, kBlockRows + room, 0.0);
        block(job, i0, count, sums, gradients, own_y, sums_y.get());
        for (int64_t i = 0; i < count; ++i) {
          if (out) static_cast<S*>(out)[i0 + i] = S(T(sums[i]));
          if (gradient)
            for (int64_t d = 0; d < job.D; ++d) write(out_x, (i0 + i) * job.D + d, gradients[i * job.ld + d]);
        }
      }
    }
  });
  if (both)
    torch::stable::parallel_for(0, job.M, 1 + (1 << 15) / (1 + job.D * stripes), [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        for (int64_t d = 0; d < job.D; ++d) {
          double total = 0;
          for (int64_t stripe = 0; stripe < stripes; ++stripe) total += totals_y[y_size * stripe + j * job.ld + d];
          write(out_y, j * job.D + d, total);
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

void check_cotangent(const char* op, const char* name, const Tensor& cotangent, const char* of, const Tensor& points) {
  STD_TORCH_CHECK(cotangent.dim() == 1 && cotangent.size(0) == points.size(0), "fastgan::", op, ": ", name, " has shape ", shape(cotangent),
                  ", expected a number for each point of ", of, ", which has shape ", shape(points));
  STD_TORCH_CHECK(cotangent.scalar_type() == points.scalar_type() && cotangent.is_cpu(), "fastgan::", op, ": ", name, " is ",
                  torch::headeronly::toString(cotangent.scalar_type()), ", expected the dtype of ", of, ", ",
                  torch::headeronly::toString(points.scalar_type()), ", on the CPU");
}

Tensor forward(const Tensor& x, const Tensor& y, const Tensor& bandwidths, const Tensor& weights, std::string kernel, double exponent, double offset,
               bool exclude_diagonal) {
  const Options options = check("pairwise_kernel_sum", x, y, bandwidths, weights, kernel, exponent, offset, exclude_diagonal);
  Tensor out = new_tensor(x, {x.size(0)});
  for_dtype(x.scalar_type(), [&](auto type) {
    run<decltype(type), Sweep::forward>(nullptr, nullptr, x, y, options, out.mutable_data_ptr(), nullptr, nullptr);
  });
  return out;
}

std::tuple<Tensor, Tensor> with_gradient(const Tensor& x, const Tensor& y, const Tensor& bandwidths, const Tensor& weights, std::string kernel,
                                         double exponent, double offset, bool exclude_diagonal) {
  const Options options = check("pairwise_kernel_sum_with_gradient", x, y, bandwidths, weights, kernel, exponent, offset, exclude_diagonal);
  Tensor out = new_tensor(x, {x.size(0)});
  Tensor gradient = new_tensor(x, {x.size(0), x.size(1)}, accumulate_dtype(x.scalar_type()));
  for_dtype(x.scalar_type(), [&](auto type) {
    run<decltype(type), Sweep::with_gradient>(nullptr, nullptr, x, y, options, out.mutable_data_ptr(), gradient.mutable_data_ptr(), nullptr);
  });
  return {out, gradient};
}

Tensor backward(const Tensor& row, const Tensor& column, const Tensor& x, const Tensor& y, const Tensor& bandwidths, const Tensor& weights,
                std::string kernel, double exponent, double offset, bool exclude_diagonal) {
  const char* op = "pairwise_kernel_sum_backward";
  const Options options = check(op, x, y, bandwidths, weights, kernel, exponent, offset, exclude_diagonal);
  check_cotangent(op, "row", row, "x", x);
  check_cotangent(op, "column", column, "y", y);
  Tensor out = new_tensor(x, {x.size(0), x.size(1)});
  for_dtype(x.scalar_type(), [&](auto type) {
    run<decltype(type), Sweep::backward>(&row, &column, x, y, options, nullptr, out.mutable_data_ptr(), nullptr);
  });
  return out;
}

std::tuple<Tensor, Tensor> backward_both(const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& bandwidths, const Tensor& weights,
                                         std::string kernel, double exponent, double offset, bool exclude_diagonal) {
  const char* op = "pairwise_kernel_sum_backward_both";
  const Options options = check(op, x, y, bandwidths, weights, kernel, exponent, offset, exclude_diagonal);
  check_cotangent(op, "grad", grad, "x", x);
  Tensor of_x = new_tensor(x, {x.size(0), x.size(1)}), of_y = new_tensor(y, {y.size(0), y.size(1)});
  for_dtype(x.scalar_type(), [&](auto type) {
    run<decltype(type), Sweep::both>(&grad, nullptr, x, y, options, nullptr, of_x.mutable_data_ptr(), of_y.mutable_data_ptr());
  });
  return {of_x, of_y};
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, library) {
  using namespace fastgan;
  library.impl("pairwise_kernel_sum", TORCH_BOX(&forward));
  library.impl("pairwise_kernel_sum_with_gradient", TORCH_BOX(&with_gradient));
  library.impl("pairwise_kernel_sum_backward", TORCH_BOX(&backward));
  library.impl("pairwise_kernel_sum_backward_both", TORCH_BOX(&backward_both));
}

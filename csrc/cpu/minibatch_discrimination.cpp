// Minibatch discrimination on the CPU: packing and distribution over threads. The arithmetic is in minibatch_discrimination.inl,
// once per instruction set.
#include "../minibatch_discrimination.h"
#include "scratch.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

namespace fastgan {
namespace {

// Samples per block: a block of coordinates and one of sums fit the first-level cache up to D = 16 or so.
constexpr int64_t kRows = 128;
// Distance between rows of samples, in elements: a whole, odd number of cache lines, lest the rows share cache sets.
template <class T> constexpr int64_t kStride = kRows + 64 / sizeof(T);

// What an operator reads and sums up, and in which row of a block each lies.
template <Operator op> struct Layout {
  static constexpr bool tangent = op == Operator::jvp || op == Operator::double_backward;
  static constexpr bool values = op != Operator::backward;
  static constexpr bool weights = op == Operator::backward || op == Operator::double_backward;
  static constexpr bool fixed_point = !tangent;
  // Packed: coordinates, then their tangents, then grad, then coordinates in fixed point and minus the sum of these. Where
  // nothing else reads the coordinates, fixed point replaces them.
  static constexpr int64_t grad_row(int64_t D) { return tangent ? 2 * D : D; }
  static constexpr int64_t fixed_row(int64_t D) { return weights ? D + 1 : 0; }
  static constexpr int64_t packed_rows(int64_t D) { return fixed_point ? fixed_row(D) + D + 1 : grad_row(D) + weights; }
  // Totals: weights by coordinate, then values.
  static constexpr int64_t value_row(int64_t D) { return weights ? D : 0; }
  static constexpr int64_t total_rows(int64_t D) { return value_row(D) + values; }
};

// A tensor (B, K) or (B, K, D), of any strides.
struct Strided {
  const void* data = nullptr;
  int64_t stride[3] = {0, 0, 0};

  Strided() = default;
  explicit Strided(const Tensor& tensor) : data(tensor.const_data_ptr()) {
    const auto strides = tensor.strides();
    for (size_t dim = 0; dim < strides.size(); ++dim) stride[dim] = strides[dim];
  }

  template <class S> const S* at(int64_t b, int64_t k, int64_t d) const {
    return static_cast<const S*>(data) + b * stride[0] + k * stride[1] + d * stride[2];
  }
};

struct Problem {
  int64_t B, K, D;
  bool self_term;
  Strided m, grad, v;
  void *values, *gradient;  // outputs, contiguous
};

}  // namespace
}  // namespace fastgan

#define FASTGAN_SIMD_SOURCE "minibatch_discrimination.inl"
#include "simd.h"

namespace fastgan {
namespace {

// Adds up the stripes' totals in order and writes kernel k of the outputs.
template <class S, Operator op> void write(const Problem& p, int64_t k, const double* totals, int64_t size, int64_t stripes) {
  using Flags = Layout<op>;
  using T = typename AccumulateIn<S>::Type;
  constexpr int64_t stride = kStride<T>;
  for (int64_t b = 0; b < p.B; ++b) {
    const double* column = totals + b / kRows * Flags::total_rows(p.D) * stride + b % kRows;
    auto total = [&](int64_t row) {
      double sum = 0;
      for (int64_t s = 0; s < stripes; ++s) sum += column[s * size + row * stride];
      return S(T(sum));
    };
    if constexpr (Flags::weights)
      for (int64_t d = 0; d < p.D; ++d) static_cast<S*>(p.gradient)[(b * p.K + k) * p.D + d] = total(d);
    if constexpr (Flags::values) static_cast<S*>(p.values)[b * p.K + k] = total(Flags::value_row(p.D));
  }
}

// D = 1: with the samples in order, sums over all smaller and all larger ones follow from their neighbours'. Sums over
// equal samples, which the sign excludes, come as groups. B log B. The recurrences run in a wider type than the samples':
// differences of large sums lose digits. False, with nothing written, where an input is not finite: what becomes of it then
// is the pairs' business.
template <class S, Operator op> bool sorted(const Problem& p, int64_t k) {
  using Flags = Layout<op>;
  using R = std::conditional_t<std::is_same_v<S, double>, long double, double>;
  struct Sample {
    R m;
    int64_t b;
  };
  // Sums of e_ij, e_ij g_j, e_ij v_j and e_ij g_j v_j, or these without e_ij.
  struct Sums {
    R one = 0, g = 0, v = 0, gv = 0;
    Sums scaled(R e) const { return {one * e, g * e, v * e, gv * e}; }
    Sums plus(const Sums& o) const { return {one + o.one, g + o.g, v + o.v, gv + o.gv}; }
  };
  std::vector<Sample> samples(p.B);
  const auto g = [&](int64_t b) { return Flags::weights ? R(*p.grad.at<S>(b, k, 0)) : R(0); };
  // Only differences of v count: from one of them, lest a common offset costs digits.
  const R origin = Flags::tangent ? R(*p.v.at<S>(0, k, 0)) : R(0);
  const auto v = [&](int64_t b) { return Flags::tangent ? R(*p.v.at<S>(b, k, 0)) - origin : R(0); };
  for (int64_t b = 0; b < p.B; ++b) {
    samples[b] = {R(*p.m.at<S>(b, k, 0)), b};
    if (!std::isfinite(samples[b].m) || !std::isfinite(g(b)) || !std::isfinite(v(b))) return false;
  }
  std::sort(samples.begin(), samples.end(), [](const Sample& a, const Sample& b) { return a.m < b.m; });

  struct Group {
    int64_t first;
    R e_before;  // exp(-distance) to the group before
    Sums own, below;
  };
  std::vector<Group> groups;
  for (int64_t i = 0; i < p.B; ++i) {
    if (i == 0 || samples[i].m != samples[i - 1].m) {
      Group group{i, i == 0 ? R(0) : std::exp(samples[i - 1].m - samples[i].m), {}, {}};
      if (i > 0) group.below = groups.back().below.plus(groups.back().own).scaled(group.e_before);
      groups.push_back(group);
    }
    const R gi = g(samples[i].b), vi = v(samples[i].b);
    groups.back().own = groups.back().own.plus({1, gi, vi, gi * vi});
  }
  Sums above;
  for (int64_t q = int64_t(groups.size()) - 1, end = p.B; q >= 0; end = groups[q--].first) {
    const Group& group = groups[q];
    const Sums &l = group.below, &r = above;
    for (int64_t i = group.first; i < end; ++i) {
      const int64_t b = samples[i].b;
      const R gi = g(b), vi = v(b);
      R value = 0, gradient = 0;
      if constexpr (op == Operator::forward) value = l.one + r.one + group.own.one - (p.self_term ? 0 : 1);
      if constexpr (op == Operator::backward) gradient = gi * (r.one - l.one) + (r.g - l.g);
      if constexpr (Flags::tangent) value = vi * (r.one - l.one) - (r.v - l.v);
      if constexpr (op == Operator::double_backward)
        gradient = gi * (vi * (l.one + r.one) - (l.v + r.v)) + vi * (l.g + r.g) - (l.gv + r.gv);
      using T = typename AccumulateIn<S>::Type;
      if constexpr (Flags::values) static_cast<S*>(p.values)[b * p.K + k] = S(T(value));
      if constexpr (Flags::weights) static_cast<S*>(p.gradient)[b * p.K + k] = S(T(gradient));
    }
    above = above.plus(group.own).scaled(group.e_before);
  }
  return true;
}

// From where on sorting was measured to be faster than the pairs, with AVX2.
constexpr int64_t kSortFrom = 256;

// Tasks are kernels; where these are few, each kernel's pairs of blocks are dealt out to several stripes. Their number
// follows from the shape alone and their sums are added in order, so results don't depend on the number of threads.
int64_t count_stripes(const Problem& p, int64_t blocks, int64_t bytes) {
  constexpr int64_t kTasks = 16, kBytes = 16 << 20;
  if (p.K >= kTasks) return 1;
  const int64_t wanted = (2 * kTasks + p.K - 1) / p.K, pairs = blocks * (blocks + 1) / 2;
  return std::max<int64_t>(1, std::min({wanted, pairs / 4, kBytes / std::max<int64_t>(1, bytes * p.K)}));
}

template <class S, Operator op> void compute(const Problem& p) {
  using Flags = Layout<op>;
  using T = typename AccumulateIn<S>::Type;
  const auto pack = FASTGAN_FOR_ISA(pack<S, T, op>);
  const auto pairs = FASTGAN_FOR_ISA(pairs<T, op>);
  const int64_t blocks = (p.B + kRows - 1) / kRows;
  const int64_t packed_size = blocks * Flags::packed_rows(p.D) * kStride<T>;
  const int64_t total_size = blocks * Flags::total_rows(p.D) * kStride<T>;
  const int64_t block_size = Flags::total_rows(p.D) * kStride<T>;
  const int64_t stripes = count_stripes(p, blocks, total_size * sizeof(double));
  // Some 10 microseconds of work are worth a thread.
  const int64_t work = p.B * (p.B + 16) / 2 * (p.D + 4) / stripes, grain = 1 + (1 << 18) / (1 + work);

  if (p.D == 1 && p.B >= kSortFrom) {
    std::vector<char> done(p.K);
    torch::stable::parallel_for(0, p.K, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) done[k] = sorted<S, op>(p, k);
    });
    if (std::all_of(done.begin(), done.end(), [](char one) { return one; })) return;
  }
  if (stripes == 1) {
    torch::stable::parallel_for(0, p.K, grain, [&](int64_t begin, int64_t end) {
      const auto packed = allocate<T>(packed_size), scratch = allocate<T>(block_size), lowest = allocate<T>(p.D);
      const auto totals = allocate<double>(total_size);
      for (int64_t k = begin; k < end; ++k) {
        std::fill_n(totals.get(), total_size, 0.0);
        const int shift = pack(p, k, packed.get(), lowest.get());
        pairs(packed.get(), shift, totals.get(), scratch.get(), p.B, p.D, p.self_term, 0, 1);
        write<S, op>(p, k, totals.get(), total_size, 1);
      }
    });
    return;
  }
  const auto packed = allocate<T>(packed_size * p.K), lowest = allocate<T>(p.D * p.K);
  std::vector<int> shift(p.K);
  const auto totals = allocate<double>(total_size * stripes * p.K);
  torch::stable::parallel_for(0, p.K, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) shift[k] = pack(p, k, packed.get() + k * packed_size, lowest.get() + k * p.D);
  });
  torch::stable::parallel_for(0, p.K * stripes, grain, [&](int64_t begin, int64_t end) {
    const auto scratch = allocate<T>(block_size);
    for (int64_t task = begin; task < end; ++task) {
      double* own = totals.get() + task * total_size;
      std::fill_n(own, total_size, 0.0);
      const int64_t k = task / stripes;
      pairs(packed.get() + k * packed_size, shift[k], own, scratch.get(), p.B, p.D, p.self_term, task % stripes, stripes);
    }
  });
  torch::stable::parallel_for(0, p.K, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) write<S, op>(p, k, totals.get() + k * stripes * total_size, total_size, stripes);
  });
}

void run(const Call& call) {
  ++calls;
  if (call.B == 0 || call.K == 0) return;
  const auto strided = [](const Tensor* tensor) { return tensor ? Strided(*tensor) : Strided(); };
  const auto memory = [](Tensor* tensor) { return tensor ? tensor->mutable_data_ptr() : nullptr; };
  const Problem problem{call.B, call.K, call.D, call.self_term, Strided(call.m), strided(call.grad), strided(call.tangent),
                        memory(call.values), memory(call.gradient)};
  for_dtype(call.m.scalar_type(), [&](auto type) {
    using S = decltype(type);
    switch (call.op) {
      case Operator::forward: return compute<S, Operator::forward>(problem);
      case Operator::backward: return compute<S, Operator::backward>(problem);
      case Operator::jvp: return compute<S, Operator::jvp>(problem);
      case Operator::double_backward: return compute<S, Operator::double_backward>(problem);
    }
  });
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, library) { fastgan::implement(library); }

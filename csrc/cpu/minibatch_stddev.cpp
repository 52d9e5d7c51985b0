// Minibatch standard deviation on the CPU: fastgan/ops/minibatch_stddev.py has the formulas. Every tensor is read once and
// written once: what is written per position while its samples are in registers, the statistic when all positions are seen.
#include "../minibatch_stddev.h"
#include "scratch.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace fastgan {
namespace {

template <Operator op> struct Needs {
  static constexpr bool tangent = op == Operator::jvp || op == Operator::double_backward;
  static constexpr bool weights = op == Operator::backward || op == Operator::double_backward;
  static constexpr bool values = op != Operator::backward;
};

// The same positions of a group's samples.
template <class S> struct Strided {
  S* data;
  int64_t stride;
  S* at(int64_t i) const { return data + i * stride; }
};

template <class S, class T> struct Columns {
  int64_t n;
  T inverse_n, inverse_count, eps, weight;  // 1 / n, 1 / N, and g / (P N)
  Strided<const S> x, v, grad;
  Strided<S> values, gradient;
};

}  // namespace
}  // namespace fastgan

#define FASTGAN_SIMD_SOURCE "minibatch_stddev.inl"
#include "simd.h"

namespace fastgan {
namespace {

constexpr int64_t kPiece = 1 << 12;  // positions at a time: sums over a piece don't depend on the number of threads

template <class S, Operator op> struct Run {
  using T = typename AccumulateIn<S>::Type;
  const Problem& p;
  const Samples &x, &v, &grad, &values, &gradient;

  template <class Pointer> Strided<Pointer> group_of(const Samples& of, int64_t group, int64_t offset) const {
    if (!of.data) return {};
    return {of.out<std::remove_const_t<Pointer>>(p.first(group)) + offset, of.stride * p.step()};
  }

  // g: all that reached the channels appended to a group's samples.
  double reached(int64_t group, int64_t slice) const {
    const int64_t between = p.last ? grad.width : 1;
    std::conditional_t<std::is_same_v<S, double>, long double, double> total = 0;  // gradients cancel
    for (int64_t i = 0; i < p.samples(group); ++i) {
      const S* from = grad.in<S>(p.first(group) + i * p.step()) + grad.offset(p.channels + slice, 0);
      for (int64_t place = 0; place < p.places; ++place) total += T(from[place * between]);
    }
    return double(total);
  }

  // Positions [begin, end) of a slice, which are runs of memory: one, or one for each place.
  double piece(int64_t group, int64_t slice, T g, int64_t begin, int64_t end, void* scratch) const {
    const auto columns = FASTGAN_FOR_ISA(columns<S, T, op>);
    const int64_t n = p.samples(group), length = p.last ? p.slice() : p.positions();
    double total = 0;
    for (int64_t at = begin; at < end;) {
      const int64_t channel = slice * p.slice() + (p.last ? at % length : 0), place = p.last ? at / length : at;
      const int64_t count = std::min(end - at, length - at % length);
      const auto offset = [&](const Samples& of) { return of.data ? of.offset(channel, place) : 0; };
      total += columns({n, T(1.0 / n), T(1.0 / (n - p.unbiased)), T(p.eps), g, group_of<const S>(x, group, offset(x)),
                        group_of<const S>(v, group, offset(v)), group_of<const S>(grad, group, offset(grad)),
                        group_of<S>(values, group, offset(values)), group_of<S>(gradient, group, offset(gradient))},
                       count, scratch);
      at += count;
    }
    return total;
  }

  void append(int64_t group, int64_t slice, S value) const {
    const int64_t between = p.last ? values.width : 1;
    for (int64_t i = 0; i < p.samples(group); ++i) {
      S* to = values.out<S>(p.first(group) + i * p.step()) + values.offset(p.channels + slice, 0);
      for (int64_t place = 0; place < p.places; ++place) to[place * between] = value;
    }
  }

  void all() const {
    const int64_t positions = p.positions(), pieces = (positions + kPiece - 1) / kPiece, slices = p.groups * p.slices;
    std::vector<T> g(slices);
    if constexpr (Needs<op>::weights)
      for (int64_t i = 0; i < slices; ++i) {
        const int64_t group = i / p.slices;
        g[i] = T(reached(group, i % p.slices) / (double(positions) * (p.samples(group) - p.unbiased)));
      }
    std::vector<double> parts(slices * pieces);
    const int64_t grain = 1 + 2 * kPiece / std::max<int64_t>(1, p.samples(0) * std::min(positions, kPiece));
    torch::stable::parallel_for(0, slices * pieces, grain, [&](int64_t begin, int64_t end) {
      const size_t room = 2 * p.samples(0) * 64;  // vectors of 64 bytes at most
      const auto scratch = allocate<char>(room);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t from = i % pieces * kPiece, slice = i / pieces;
        parts[i] = piece(slice / p.slices, slice % p.slices, g[slice], from, std::min(positions, from + kPiece), scratch.get());
      }
    });
    if constexpr (Needs<op>::values)
      for (int64_t i = 0; i < slices; ++i) {
        double total = 0;
        for (int64_t part = 0; part < pieces; ++part) total += parts[i * pieces + part];
        append(i / p.slices, i % p.slices, S(T(total / positions)));
      }
  }
};

template <class S, Operator op> void compute(const Call& call) {
  Run<S, op>{call.problem, call.x, call.v, call.grad, call.values, call.gradient}.all();
}

void run(const Call& call) {
  for_dtype(call.x.tensor.scalar_type(), [&](auto type) {
    using S = decltype(type);
    switch (call.op) {
      case Operator::forward: return compute<S, Operator::forward>(call);
      case Operator::backward: return compute<S, Operator::backward>(call);
      case Operator::jvp: return compute<S, Operator::jvp>(call);
      case Operator::double_backward: return compute<S, Operator::double_backward>(call);
    }
  });
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, library) { fastgan::implement(library); }

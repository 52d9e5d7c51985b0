// Minibatch standard deviation on the CPU: fastgan/ops/minibatch_stddev.py has the formulas. Every tensor is read once and
// written once: what is written per position while its samples are in registers, the statistic when all positions are seen.
#include "common.h"
#include "scratch.h"

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

namespace fastgan {
namespace {

enum class Operator { forward, backward, jvp, double_backward };

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

using torch::headeronly::MemoryFormat;

constexpr int64_t kPiece = 1 << 12;  // positions at a time: sums over a piece don't depend on the number of threads

MemoryFormat channels_last_of(int64_t dim) { return dim == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast; }

// Does each x[i] lie in this order, however far apart?
bool rows_lie(const Tensor& x, bool channels_last) {
  int64_t run = 1;
  const auto next = [&](int64_t dim) {
    const bool lies = x.size(dim) == 1 || x.stride(dim) == run;
    run *= x.size(dim);
    return lies;
  };
  if (channels_last && !next(1)) return false;
  for (int64_t dim = x.dim() - 1; dim > int64_t(channels_last); --dim)
    if (!next(dim)) return false;
  return true;
}

bool is_channels_last(const Tensor& x) {
  return (x.dim() == 4 || x.dim() == 5) && !x.is_contiguous() && rows_lie(x, true) &&
         (x.size(0) == 1 || x.stride(0) * x.size(0) == x.numel());
}

struct Problem {
  int64_t batch, channels, places, groups, slices;
  bool strided, unbiased, last;
  double eps;

  Problem(const char* op, const Tensor& x, int64_t groups, bool strided, int64_t slices, bool unbiased, double eps)
      : places(1), groups(groups), slices(slices), strided(strided), unbiased(unbiased), eps(eps) {
    check_float(op, "x", x);
    STD_TORCH_CHECK(x.dim() >= 2 && slices >= 1 && x.size(1) >= 1 && x.size(1) % slices == 0, "fastgan::", op, ": x has shape ",
                    shape(x), ", expected (B, C, ...) with C a multiple of num_channels=", slices);
    batch = x.size(0), channels = x.size(1), last = is_channels_last(x);
    for (int64_t dim = 2; dim < x.dim(); ++dim) places *= x.size(dim);
    STD_TORCH_CHECK(groups >= 1 && (batch == 0 || batch >= groups * (1 + unbiased)), "fastgan::", op, ": groups is ", groups,
                    " for a batch of ", batch, ", expected groups of ", 1 + unbiased, " or more");
  }
  int64_t slice() const { return channels / slices; }
  int64_t positions() const { return slice() * places; }
  int64_t samples(int64_t group) const { return batch / groups + (group < batch % groups); }
  int64_t first(int64_t group) const { return strided ? group : group * (batch / groups) + std::min(group, batch % groups); }
  int64_t step() const { return strided ? groups : 1; }

  Tensor output(const Tensor& x, int64_t extra) const {
    std::vector<int64_t> sizes;
    for (int64_t dim = 0; dim < x.dim(); ++dim) sizes.push_back(x.size(dim) + (dim == 1 ? extra : 0));
    return torch::stable::empty(sizes, x.scalar_type(), {}, x.device(), {}, last ? channels_last_of(x.dim()) : MemoryFormat::Contiguous);
  }
};

// A tensor (B, C or C + F, ...) that lies in the problem's order.
struct Samples {
  Tensor tensor;
  const void* data = nullptr;
  int64_t stride = 0, places = 0, width = 0;
  bool last = false;

  Samples() = default;
  Samples(const Problem& p, const Tensor& x)
      : tensor(rows_lie(x, p.last) ? x : torch::stable::contiguous(x, p.last ? channels_last_of(x.dim()) : MemoryFormat::Contiguous)),
        data(tensor.const_data_ptr()), stride(tensor.stride(0)), places(p.places), width(x.size(1)), last(p.last) {}

  // Of a channel and a place in it.
  int64_t offset(int64_t channel, int64_t place) const { return last ? place * width + channel : channel * places + place; }
  template <class S> const S* in(int64_t sample) const { return static_cast<const S*>(data) + sample * stride; }
  template <class S> S* out(int64_t sample) const { return const_cast<S*>(in<S>(sample)); }
};

template <class S, Operator op> struct Run {
  using T = typename AccumulateIn<S>::Type;
  const Problem& p;
  Samples x, v, grad, values, gradient;

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
    if (p.batch == 0 || pieces == 0) return;
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

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x, int64_t extra) {
  bool same = t.dim() == x.dim();
  for (int64_t dim = 0; same && dim < x.dim(); ++dim) same = t.size(dim) == x.size(dim) + (dim == 1 ? extra : 0);
  STD_TORCH_CHECK(same && t.scalar_type() == x.scalar_type() && t.is_cpu(), "fastgan::", op, ": ", name, " has shape ", shape(t),
                  ", expected that of x, ", shape(x), ", with ", extra, " channels more, of its dtype and on the CPU");
}

// The outputs that op has: values like grad, gradient like x.
template <Operator op>
std::tuple<Tensor, Tensor> run(const char* name, const Tensor* v, const Tensor* grad, const Tensor& x, int64_t groups, bool strided,
                               int64_t num_channels, bool unbiased, double eps) {
  ++calls;
  const Problem p(name, x, groups, strided, num_channels, unbiased, eps);
  if (v) check_like(name, op == Operator::jvp ? "t" : "v", *v, x, 0);
  if (grad) check_like(name, "grad", *grad, x, num_channels);
  const Tensor values = Needs<op>::values ? p.output(x, num_channels) : Tensor();
  const Tensor gradient = Needs<op>::weights ? p.output(x, 0) : Tensor();
  const auto samples = [&](const Tensor* of, bool used = true) { return of && used ? Samples(p, *of) : Samples(); };
  for_dtype(x.scalar_type(), [&](auto type) {
    Run<decltype(type), op>{p, samples(&x), samples(v), samples(grad), samples(&values, Needs<op>::values),
                            samples(&gradient, Needs<op>::weights)}
        .all();
  });
  return {values, gradient};
}

Tensor forward(const Tensor& x, int64_t groups, bool strided, int64_t num_channels, bool unbiased, double eps) {
  return std::get<0>(run<Operator::forward>("minibatch_stddev", nullptr, nullptr, x, groups, strided, num_channels, unbiased, eps));
}

Tensor backward(const Tensor& grad, const Tensor& x, int64_t groups, bool strided, int64_t num_channels, bool unbiased, double eps) {
  return std::get<1>(
      run<Operator::backward>("minibatch_stddev_backward", nullptr, &grad, x, groups, strided, num_channels, unbiased, eps));
}

Tensor jvp(const Tensor& t, const Tensor& x, int64_t groups, bool strided, int64_t num_channels, bool unbiased, double eps) {
  return std::get<0>(run<Operator::jvp>("minibatch_stddev_jvp", &t, nullptr, x, groups, strided, num_channels, unbiased, eps));
}

std::tuple<Tensor, Tensor> double_backward(const Tensor& v, const Tensor& grad, const Tensor& x, int64_t groups, bool strided,
                                           int64_t num_channels, bool unbiased, double eps) {
  return run<Operator::double_backward>("minibatch_stddev_double_backward", &v, &grad, x, groups, strided, num_channels, unbiased, eps);
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, library) {
  using namespace fastgan;
  library.impl("minibatch_stddev", TORCH_BOX(&forward));
  library.impl("minibatch_stddev_backward", TORCH_BOX(&backward));
  library.impl("minibatch_stddev_jvp", TORCH_BOX(&jvp));
  library.impl("minibatch_stddev_double_backward", TORCH_BOX(&double_backward));
}

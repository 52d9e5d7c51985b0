// Minibatch standard deviation on CUDA: fastgan/ops/minibatch_stddev.py has the formulas.
//
// A block owns a piece of the positions of one slice of channels in one group and goes through the group's samples three times: for
// the mean, for the deviation, and for what is written. Small groups stay in registers meanwhile; of larger ones only the first time
// reads past the caches. A second launch adds up the pieces and writes the channels appended. What reached these, with a gradient,
// every block adds up itself where that is little, else a launch before does. No atomics: the same bits on every run.
#include "minibatch_stddev.h"

#include "cuda.h"

namespace fastgan::minibatch_stddev {
namespace {

static_assert(kThreads == kBlock);

// The samples of a group, and one slice of their channels.
struct Group {
  int64_t first, step, size, slice;

  __device__ Group(const Problem& p, unsigned unit) : slice(unit % unsigned(p.slices)) {
    const int64_t group = unit / unsigned(p.slices);
    first = p.strided ? group : group * p.size + min(group, p.larger);
    step = p.strided ? p.groups : 1;
    size = p.size + (group < p.larger);
  }
  // f(offset in `of`) for this thread's elements of one share of what is appended.
  template <class F> __device__ void for_each_appended(const Problem& p, const Samples& of, int64_t share, const F& f) const {
    const int64_t base = p.slices * p.run + slice * p.channel, end = min((share + 1) * kShare, size * p.places);
    for (int64_t at = share * kShare + threadIdx.x; at < end; at += kBlock)
      f((first + at / p.places * step) * of.sample + base + at % p.places * of.place);
  }
};

// The same positions of a group's samples.
template <class T> struct Column {
  T* data;
  int64_t step;
  __device__ T* operator[](int64_t i) const { return data + i * step; }
};

// As one number: of a struct nvcc may store one member after the other.
template <int N, class T> __device__ void store_whole(T* to, const Pack<T, N>& pack) {
  using Word = std::conditional_t<N == 1, Pack<T, N>, std::conditional_t<sizeof(pack) == 16, unsigned __int128, uint64_t>>;
  static_assert(sizeof(Word) == sizeof(pack));
  Word word;
  memcpy(&word, &pack, sizeof(word));
  *reinterpret_cast<Word*>(to) = word;
}

__device__ double sum_of(const double* __restrict__ parts, int64_t count) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < count; i += kBlock) total += parts[i];
  return block_sum(total);
}

template <class T> __device__ double share_sum(const T* __restrict__ grad, const Group& group, const Problem& p, const Samples& of, int64_t share) {
  double total = 0;
  group.for_each_appended(p, of, share, [&](int64_t at) { total += static_cast<typename Accumulate<T>::type>(grad[at]); });
  return block_sum(total);
}

// What the first thread has, for the block; once in a kernel.
__device__ double of_first_thread(double value) {
  __shared__ double shared;
  if (threadIdx.x == 0) shared = value;
  __syncthreads();
  return shared;
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    add_shares(const T* __restrict__ grad, double* __restrict__ reached, const Problem p, const Samples of, const unsigned shares) {
  const double sum = share_sum(grad, Group(p, blockIdx.x / shares), p, of, blockIdx.x % shares);
  if (threadIdx.x == 0) reached[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    append(const double* __restrict__ parts, T* __restrict__ values, const Problem p, const Samples of, const unsigned pieces, const unsigned shares) {
  const unsigned unit = blockIdx.x / shares;
  const double mean = of_first_thread(sum_of(parts + int64_t(unit) * pieces, pieces) / p.positions);
  const T value = static_cast<T>(static_cast<typename Accumulate<T>::type>(mean));
  Group(p, unit).for_each_appended(p, of, blockIdx.x % shares, [&](int64_t at) { values[at] = value; });
}

// Forward, with Tangent jvp, with Weights backward, with both double_backward. `reached` is null where it isn't added up before.
template <class T, int N, int Keep, bool Tangent, bool Weights>
__global__ void __launch_bounds__(kBlock, 2)
    columns(const T* __restrict__ x, const T* __restrict__ v, const T* __restrict__ grad, const double* __restrict__ reached,
            T* __restrict__ values, T* __restrict__ gradient, double* __restrict__ parts, const Problem p,
            const Tensors of,  // their strides: what pointers in a struct point to may overlap
            const unsigned pieces, const unsigned shares) {
  using A = typename Accumulate<T>::type;
  constexpr bool kValues = Tangent || !Weights, kSecond = Tangent || Weights;
  const unsigned unit = blockIdx.x / pieces;
  const Group group(p, unit);
  const int64_t position = (int64_t(blockIdx.x % pieces) * kBlock + threadIdx.x) * N;
  const int64_t own = position < p.positions ? group.size : 0;  // samples that this thread has
  const int64_t run = p.run < p.positions ? position / p.run : 0;
  const auto column = [&](auto* data, const Samples& of) {
    return Column{data + group.first * of.sample + group.slice * p.run + run * of.place + (position - run * p.run), group.step * of.sample};
  };
  const auto own_x = column(x, of.x), second = Tangent ? column(v, of.v) : column(grad, of.grad);
  const auto own_values = column(values, of.values), own_gradient = column(gradient, of.gradient);

  constexpr int kFirst = Keep ? Keep : 1;  // samples that are read at once
  Pack<T, N> kept[kFirst], kept_second[kFirst];
#pragma unroll
  for (int i = 0; i < kFirst; ++i)
    if (i < own) {
      kept[i] = load<N>(own_x[i]);
      if constexpr (kSecond && (Keep || Tangent)) kept_second[i] = load<N>(second[i]);
    }
  // f(i, x, v or grad) for this thread's samples.
  const auto for_each_sample = [&](const auto& f) {
    if constexpr (Keep) {
#pragma unroll
      for (int i = 0; i < Keep; ++i)
        if (i < own) f(i, kept[i], kept_second[i]);
    } else {
#pragma unroll 4
      for (int64_t i = 0; i < own; ++i) {
        Pack<T, N> one;
        if constexpr (kSecond) one = load<N>(second[i]);
        f(i, load<N>(own_x[i]), one);
      }
    }
  };
  // From one sample before from the mean: equal samples give 0 without rounding.
  const auto from_first = [](const Pack<T, N>& pack, const Pack<T, N>& first, int j) {
    return static_cast<A>(pack.value[j]) - static_cast<A>(first.value[j]);
  };
  const Pack<T, N>&first = kept[0], &first_v = kept_second[0];
  const A size = static_cast<A>(group.size), count = static_cast<A>(group.size - p.unbiased);

  A weight = 0;  // g / (P N)
  if constexpr (Weights) {
    const double sum = reached ? sum_of(reached + int64_t(unit) * shares, shares) : share_sum(grad, group, p, of.grad, 0);
    weight = static_cast<A>(of_first_thread(sum / (static_cast<double>(p.positions) * (group.size - p.unbiased))));
  }

  A mean[N] = {}, mean_v[N] = {}, squares[N] = {}, products[N] = {};
  for_each_sample([&](int64_t i, const Pack<T, N>& x, const Pack<T, N>& v) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      mean[j] += from_first(x, first, j);
      if constexpr (Tangent) mean_v[j] += from_first(v, first_v, j);
    }
    if constexpr (kValues) store_whole<N>(own_values[i], Tangent ? v : x);
  });
#pragma unroll
  for (int j = 0; j < N; ++j) mean[j] /= size, mean_v[j] /= size;
  for_each_sample([&](int64_t, const Pack<T, N>& x, const Pack<T, N>& v) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const A d = from_first(x, first, j) - mean[j];
      squares[j] += d * d;
      if constexpr (Tangent) products[j] += (from_first(v, first_v, j) - mean_v[j]) * d;
    }
  });
  A total = 0, scale[N], slope[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const A sigma = sqrt(squares[j] / count + static_cast<A>(p.eps)), inverse = sigma == 0 ? 0 : 1 / sigma;
    const A statistic = Tangent ? products[j] / count * inverse : sigma;
    total += statistic;
    scale[j] = weight * inverse, slope[j] = statistic * inverse;
  }
  if constexpr (kValues) {
    const double sum = block_sum(own ? total : 0);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
  }
  if constexpr (Weights)
    for_each_sample([&](int64_t i, const Pack<T, N>& x, const Pack<T, N>& second) {
      Pack<T, N> result;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const A d = from_first(x, first, j) - mean[j];
        if constexpr (Tangent)
          result.value[j] = static_cast<T>(scale[j] * (from_first(second, first_v, j) - mean_v[j] - slope[j] * d));
        else
          result.value[j] = static_cast<T>(static_cast<A>(second.value[j]) + scale[j] * d);
      }
      store_whole<N>(own_gradient[i], result);
    });
}

template <class T, int N, int Keep> auto columns_of(bool tangent, bool weights) {
  return tangent ? weights ? columns<T, N, Keep, true, true> : columns<T, N, Keep, true, false>
                 : weights ? columns<T, N, Keep, false, true> : columns<T, N, Keep, false, false>;
}

}  // namespace

void launch(const char* op, Dtype dtype, const Problem& p, const Tensors& tensors, const Cut& cut, double* scratch, Stream stream) {
  const auto& [x, v, grad, values, gradient] = tensors;
  const bool keeps = p.largest() <= kKept, tangent = v.data, weights = gradient.data;
  double* const reached = cut.adds_before(tensors) ? scratch + cut.parts(p, tensors) : nullptr;
  const unsigned of_pieces = grid_of(op, p.units() * cut.pieces), of_shares = grid_of(op, p.units() * cut.shares);
  for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const auto in = [](const Samples& of) { return static_cast<const T*>(of.data); };
    const auto out = [](const Samples& of) { return static_cast<T*>(const_cast<void*>(of.data)); };
    if (reached) {
      add_shares<<<of_shares, kBlock, 0, stream>>>(in(grad), reached, p, grad, cut.shares);
      check_launch(op);
    }
    constexpr int N = pack_of(sizeof(T));
    const auto kernel = cut.pack > 1 ? keeps ? columns_of<T, N, kKept>(tangent, weights) : columns_of<T, N, 0>(tangent, weights)
                                     : keeps ? columns_of<T, 1, kKept>(tangent, weights) : columns_of<T, 1, 0>(tangent, weights);
    kernel<<<of_pieces, kBlock, 0, stream>>>(in(x), in(v), in(grad), reached, out(values), out(gradient), scratch, p, tensors, cut.pieces,
                                             cut.shares);
    check_launch(op);
    if (values.data) {
      append<<<of_shares, kBlock, 0, stream>>>(scratch, out(values), p, values, cut.pieces, cut.shares);
      check_launch(op);
    }
  });
}

}  // namespace fastgan::minibatch_stddev

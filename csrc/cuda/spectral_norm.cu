// Spectral norm on CUDA: fastgan/ops/spectral_norm.py has the mathematics.
//
// All weights of a call share their launches: three for a power iteration with the normalised weights, two for a backward. A
// block finds its layer in the launch's argument (spectral_norm.h).
//
// One iteration meets W once. With its rows as *own* dimension and its columns as *full* (u first; v first the other way round)
// a block brings tiles of some own and all full indices to shared memory, takes the products y of the own ones with the vector
// at hand, and adds y times the tile to its piece of the other vector::
//
//     products   y = W_own full,  piece = sum over own of (y / scale) W_own, scale a power of two about max |y|: nothing overflows
//     reduce     x = sum over pieces of scale / |y| piece, what the iteration yields before it is normalised; sums of its squares
//     finish     the own vector y / |y|, the full one x / |x|, sigma = |x|; out = s W
//
// Sums over blocks are of numbers in memory, in order and in double: no atomics, the same bits on every run.
#include "spectral_norm.h"

#include <cuda_pipeline_primitives.h>

#include "cuda.h"

namespace fastgan::spectral_norm {
namespace {

constexpr int kThreadBits = 8;
static_assert(kThreads == 1 << kThreadBits && kThreads == kBlock, "the sums over blocks of cuda.h");

enum Kernel { kProducts, kReduce, kFinish, kInner = 0, kCombine };

__device__ const Layer& layer_of_block(const Layers& layers, int kernel) {
  int low = 0, high = layers.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (layers.layer[middle].first[kernel] <= blockIdx.x) low = middle;
    else high = middle - 1;
  }
  return layers.layer[low];
}

// How a block's threads are shared out: teams of a power of two of neighbours, as many as `count` things need, within limits.
struct Team {
  int bits;
  __device__ explicit Team(int count, int most = kThreads) { bits = 32 - __clz(min(max(count, 1), most) - 1); }
  __device__ int size() const { return 1 << bits; }
  __device__ int teams() const { return kThreads >> bits; }
  __device__ int lane() const { return threadIdx.x & (size() - 1); }
  __device__ int number() const { return threadIdx.x >> bits; }
  // How many of `count` things fall to a lane, and to a team. Counted ahead: to unroll a loop whose step is not known until it
  // runs, the compiler would divide.
  __device__ int for_lane(int count) const { return (count - lane() + size() - 1) >> bits; }
  __device__ int for_team(int count) const { return (count - number() + teams() - 1) >> (kThreadBits - bits); }
};

// A piece of a weight in shared memory, `pitch` elements to a row. Narrow: of at most 128 bytes to a row, in an order in which
// eight threads that each take 16 bytes find them in different banks, be they neighbours in a row or in a column.
template <class T, bool kNarrow> struct Tile {
  T* data;
  int pitch;

  __device__ T* at(int row, int column) const {
    const unsigned place = row * pitch + column;
    if constexpr (!kNarrow) return data + place;
    constexpr unsigned P = kPacked<T>;  // elements of a unit; 8 of them fill a line, the next line begins with another
    return data + (place ^ (place / 8 & (unsigned(pitch) - P)));
  }
};

// Rows of a weight, and some of its columns; columns from `valid` up to `padded` are zeros. Leaves the copies on their way.
template <int N, class T, bool kNarrow>
__device__ void load_tile(const Tile<T, kNarrow>& tile, const Layer& layer, int row, int rows, int column, int valid, int padded) {
  const Team team(padded / N);
  int c = team.lane() * N;
#pragma unroll 1
  for (int of_lane = team.for_lane(padded / N); of_lane; --of_lane, c += team.size() * N) {
    const bool inside = c < valid;
    const T* from = static_cast<const T*>(layer.weight) + (inside ? layer.place(row + team.number(), column + c) : 0);
    const int64_t stride = inside ? int64_t(team.teams()) * layer.run : 0;
    int to = team.number();
#pragma unroll 4
    for (int left = team.for_team(rows); left; --left, from += stride, to += team.teams()) {
      if constexpr (N > 1) {
        if (inside) __pipeline_memcpy_async(tile.at(to, c), from, N * sizeof(T));
        else store<N>(tile.at(to, c), Pack<T, N>{});
      } else {
        *tile.at(to, c) = inside ? *from : T(0.f);
      }
    }
  }
}

// emit(row, sum over columns of tile * vector), by one thread for each row. Of a narrow tile a thread takes neighbouring columns.
template <class T, bool kNarrow, class A, class F>
__device__ void row_products(const Tile<T, kNarrow>& tile, int rows, int columns, const A* vector, A* of_warp, const F& emit) {
  constexpr int N = kNarrow ? kPacked<T> : kTogether<A>, M = kTogether<A>;
  const int all = columns / N, fewest = kThreads / Team(rows).size();
  const Team team(all, kNarrow ? fewest : max(32, fewest));
  const int neighbours = (all + team.size() - 1) >> team.bits;
  const int share = kNarrow ? min(neighbours, all - team.lane() * neighbours) : team.for_lane(all);
  const int begin = team.lane() * N * (kNarrow ? neighbours : 1), step = N * (kNarrow ? 1 : team.size());
#pragma unroll 1
  for (int row = team.number(), first = 0; first < rows; first += team.teams(), row += team.teams()) {
    A sum = 0;
    int column = begin;
    if (row < rows)
#pragma unroll 4
      for (int left = share; left > 0; --left, column += step) {
        const Pack<T, N> w = load<N>(tile.at(row, column));
#pragma unroll
        for (int part = 0; part < N; part += M) {
          const Pack<A, M> x = load<M>(vector + column + part);
#pragma unroll
          for (int i = 0; i < M; ++i) sum += static_cast<A>(w.value[part + i]) * x.value[i];
        }
      }
#pragma unroll
    for (int step = 1; step < 32; step *= 2)
      if (step < team.size()) sum += __shfl_down_sync(~0u, sum, step);
    if (team.size() > 32) {  // then there are no more rows than teams
      if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
      __syncthreads();
      for (int warp = 1; team.lane() == 0 && warp < team.size() / 32; ++warp) sum += of_warp[threadIdx.x / 32 + warp];
    }
    if (team.lane() == 0 && row < rows) emit(row, sum);
  }
}

// emit(column, sums over rows of vector * tile of N columns from there), by one thread for each N of them.
template <class T, bool kNarrow, class A, class F>
__device__ void column_products(const Tile<T, kNarrow>& tile, int rows, int columns, const A* vector, Pack<A, kTogether<A>>* partial, const F& emit) {
  constexpr int N = kTogether<A>;
  const Team team(columns / N);
  const auto over_rows = [&](int column) {
    Pack<A, N> sum = {};
    int row = team.number();
#pragma unroll 4
    for (int left = team.for_team(rows); left; --left, row += team.teams()) {
      const Pack<T, N> w = load<N>(tile.at(row, column));
      const A x = vector[row];
#pragma unroll
      for (int i = 0; i < N; ++i) sum.value[i] += static_cast<A>(w.value[i]) * x;
    }
    return sum;
  };
  const int column = team.lane() * N;
  if (team.teams() == 1) {
    for (int c = column; c < columns; c += kThreads * N) emit(c, over_rows(c));
    return;
  }
  Pack<A, N> sum = {};
  if (column < columns) sum = over_rows(column);
#pragma unroll
  for (int step = 16; step; step /= 2)
#pragma unroll
    for (int i = 0; i < N && step >= team.size(); ++i) sum.value[i] += __shfl_down_sync(~0u, sum.value[i], step);
  // Where a team is less than a warp, each warp's sums are in its first team now.
  if (threadIdx.x % 32 < team.size()) partial[(threadIdx.x >> max(team.bits, 5)) * team.size() + team.lane()] = sum;
  __syncthreads();
  if (threadIdx.x >= team.size() || column >= columns) return;
  for (int group = 1; group < min(team.teams(), kThreads / 32); ++group)
#pragma unroll
    for (int i = 0; i < N; ++i) sum.value[i] += partial[group * team.size() + team.lane()].value[i];
  emit(column, sum);
}

// The power of two at or below x > 0: dividing by it is exact. 1 for 0 and what is too small to be divided by.
__device__ inline float power_of_two(float x) {
  const float power = __int_as_float(__float_as_int(x) & 0x7F800000);
  return power > 0 ? power : 1;
}
__device__ inline double power_of_two(double x) {
  const double power = __longlong_as_double(__double_as_longlong(x) & 0x7FF0000000000000);
  return power > 0 ? power : 1;
}

// Own indices of a block: their products, its piece of the other vector, and sums over the block.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)  // the 2: ptxas else spills a few bytes to reach its next step of occupancy
    products(const __grid_constant__ Layers layers, const bool v_first, const bool first, const bool iterate) {
  using A = typename Accumulate<T>::type;
  constexpr int N = kTogether<A>;
  const Layer& layer = layer_of_block(layers, kProducts);
  const Scratch<A> scratch(layer, v_first);
  const int block = blockIdx.x - layer.first[kProducts], chunk = layer.chunk;
  const int own_count = layer.own_count(v_first), full_count = layer.full_count(v_first);
  const A* other = static_cast<const A*>(v_first ? (first ? layer.u : layer.new_u) : (first ? layer.v : layer.new_v));
  A* piece = scratch.pieces + int64_t(block) * full_count;
  const bool whole = full_count <= chunk;

  extern __shared__ __align__(16) char shared[];
  __shared__ A of_warp[kThreads / 32];
  const int own_room = (layer.own + 7) / 8 * 8;
  auto* partial = reinterpret_cast<Pack<A, N>*>(shared);
  A *vector = reinterpret_cast<A*>(shared + partial_bytes(v_first ? layer.own : chunk, sizeof(A))), *sums = vector + chunk, *y = sums + chunk, *scaled = y + own_room;
  const Tile<T, false> wide{reinterpret_cast<T*>(scaled + own_room), chunk};  // u first
  const Tile<T, true> narrow{wide.data, layer.own};                            // v first

  A largest = 0;
  double square = 0;
  for (int number = 0; number < layer.tiles; ++number) {
    const int begin = (block * layer.tiles + number) * layer.own;
    if (begin >= own_count) break;
    const int own = min(layer.own, own_count - begin);
    const auto bring = [&](int from, int count) {
      constexpr int P = kPacked<T>;
      const auto load = [&](auto size) {
        constexpr int N = decltype(size)::value;
        if (v_first) load_tile<N>(narrow, layer, from, count, begin, own, layer.own);
        else load_tile<N>(wide, layer, begin, own, from, count, (count + 7) / 8 * 8);
      };
      if (layer.run % P == 0 && reinterpret_cast<uintptr_t>(layer.weight) % 16 == 0) load(std::integral_constant<int, P>());
      else load(std::integral_constant<int, 1>());
      __pipeline_commit();
      __pipeline_wait_prior(0);
    };
    int from = 0;
    for (;; from += chunk) {
      const int count = min(chunk, full_count - from), padded = (count + 7) / 8 * 8;
      __syncthreads();  // the tile before this one may still be read
      if (number == 0 || !whole)
        for (int i = threadIdx.x; i < padded; i += kThreads)
          vector[i] = i < count ? other[v_first ? from + i : layer.place_in_v(from + i)] : A(0);
      bring(from, count);
      __syncthreads();
      const bool begins = from == 0;
      if (v_first)
        column_products(narrow, count, layer.own, vector, partial, [&](int column, const Pack<A, N>& sum) {
          Pack<A, N> all = begins ? Pack<A, N>{} : load<N>(y + column);
#pragma unroll
          for (int i = 0; i < N; ++i) all.value[i] += sum.value[i];
          store<N>(y + column, all);
        });
      else
        row_products(wide, own, padded, vector, of_warp, [&](int row, A sum) { y[row] = begins ? sum : y[row] + sum; });
      if (from + chunk >= full_count) break;
    }
    __syncthreads();
    // Every warp for itself: the largest of |y|.
    const A before = largest;
    for (int i = threadIdx.x % 32; i < own; i += 32) {
      largest = max(largest, y[i] < 0 ? -y[i] : y[i]);
      if (threadIdx.x < 32) square += double(y[i]) * double(y[i]);
    }
    for (int step = 16; step; step /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, step));
    const A scale = power_of_two(largest), shrunk = before > 0 ? power_of_two(before) / scale : A(1);
    for (int i = threadIdx.x; i < own_room; i += kThreads) {
      scaled[i] = i < own ? y[i] / scale : A(0);
      if (i < own) scratch.y[begin + i] = y[i];
    }
    if (!iterate) continue;
    // Back through the chunks: the last one is still here, the others are in a cache where they are.
    for (bool here = true; from >= 0; from -= chunk, here = false) {
      const int count = min(chunk, full_count - from), padded = (count + 7) / 8 * 8;
      if (!here) bring(from, count);
      __syncthreads();
      const bool begins = number == 0 || !whole;
      if (v_first)
        row_products(narrow, count, layer.own, scaled, of_warp,
                     [&](int row, A sum) { sums[row] = begins ? sum : sums[row] * shrunk + sum; });
      else
        column_products(wide, own, padded, scaled, partial, [&](int column, const Pack<A, N>& sum) {
          Pack<A, N> all = begins ? Pack<A, N>{} : load<N>(sums + column);
#pragma unroll
          for (int i = 0; i < N; ++i) all.value[i] = all.value[i] * shrunk + sum.value[i];
          store<N>(sums + column, all);
        });
      if (whole) break;
      __syncthreads();
      for (int i = threadIdx.x; i < count; i += kThreads) piece[from + i] = sums[i];
    }
  }
  if (!iterate) return;
  __syncthreads();
  for (int i = threadIdx.x; whole && i < full_count; i += kThreads) piece[i] = sums[i];
  for (int step = 16; step; step /= 2) square += __shfl_down_sync(~0u, square, step);
  if (threadIdx.x == 0) scratch.squares[block] = square, scratch.scales[block] = power_of_two(largest);
}

// The sum of doubles in memory, for all threads of the block, in an order that their number alone decides.
__device__ inline double total_of(const double* values, int count) {
  __shared__ double result;
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += values[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) result = sum;
  __syncthreads();
  sum = result;
  __syncthreads();
  return sum;
}

// Some full indices: the sum of their pieces over the norm of the own vector, and of the squares of that.
template <class A>
__global__ void __launch_bounds__(kThreads) reduce(const __grid_constant__ Layers layers, const bool v_first, const double eps) {
  const Layer& layer = layer_of_block(layers, kReduce);
  const Scratch<A> scratch(layer, v_first);
  const int block = blockIdx.x - layer.first[kReduce], blocks = layer.product_blocks(v_first), full_count = layer.full_count(v_first);
  const double norm = max(sqrt(total_of(scratch.squares, blocks)), eps);
  constexpr int kGroups = kThreads / kReduced;
  __shared__ A of_group[kGroups][kReduced];
  const int group = threadIdx.x / kReduced, place = threadIdx.x % kReduced;
  const int full = block * kReduced + place;
  A x = 0;
  if (full < full_count)
#pragma unroll 4
    for (int piece = group; piece < blocks; piece += kGroups)
      x += scratch.pieces[int64_t(piece) * full_count + full] * A(double(scratch.scales[piece]) / norm);
  of_group[group][place] = x;
  __syncthreads();
  if (group == 0)
    for (int other = 1; other < kGroups; ++other) x += of_group[other][place];
  if (group == 0 && full < full_count) scratch.x[full] = x;
  const double square = block_sum(group == 0 ? double(x) * double(x) : 0);
  if (threadIdx.x == 0) scratch.tile_squares[block] = square;
}

template <class A> struct Scale {
  A value, slope;  // s and ds/dsigma
  __device__ Scale(A sigma, A target, bool at_most) {
    const bool active = at_most ? !(sigma <= target) : sigma != 0;
    value = active ? target / sigma : A(1);
    slope = active ? -value / sigma : A(0);
  }
};

__device__ inline bool packed(const void* a, const void* b) {
  return (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

// Some elements of s W; of u and v those of the same numbers. Every block of a layer finds the same sigma.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish(const __grid_constant__ Layers layers, const bool v_first, const bool first, const bool iterated, const bool write,
           const double eps, const double target, const bool at_most) {
  using A = typename Accumulate<T>::type;
  const Layer& layer = layer_of_block(layers, kFinish);
  const Scratch<A> scratch(layer, v_first);
  const int64_t block = blockIdx.x - layer.first[kFinish], begin = block * kStreamed;
  const A *u = static_cast<const A*>(first ? layer.u : layer.new_u), *v = static_cast<const A*>(first ? layer.v : layer.new_v);
  double own_norm = 1, full_norm = 1, own_square = 0, full_square = 0;
  if (iterated) {
    own_square = total_of(scratch.squares, layer.product_blocks(v_first));
    full_square = total_of(scratch.tile_squares, layer.reduce_blocks(v_first));
    own_norm = max(sqrt(own_square), eps), full_norm = max(sqrt(full_square), eps);
  }
  const double infinity = __longlong_as_double(0x7FF0000000000000);
  const bool usable = own_square > 0 && own_square < infinity && full_square > 0 && full_square < infinity;
  double exact = full_square / full_norm;
  if (!usable) {  // no step: what came first is W v (or W^T u) for the vectors that stay
    double sum = 0;
    for (int i = threadIdx.x; i < layer.own_count(v_first); i += kThreads)
      sum += double(v_first ? v[layer.place_in_v(i)] : u[i]) * double(scratch.y[i]);
    __shared__ double result;
    sum = block_sum(sum);
    if (threadIdx.x == 0) result = sum;
    __syncthreads();
    exact = result;
  }
  const A sigma = static_cast<A>(exact);
  if (begin == 0 && threadIdx.x == 0) *static_cast<A*>(layer.sigma) = sigma;
  const A *of_u = v_first ? scratch.x : scratch.y, *of_v = v_first ? scratch.y : scratch.x;
  const double u_norm = v_first ? full_norm : own_norm, v_norm = v_first ? own_norm : full_norm;
  for (int64_t i = begin + threadIdx.x; i < min(int64_t(layer.rows), begin + kStreamed); i += kThreads)
    static_cast<A*>(layer.new_u)[i] = usable ? static_cast<A>(of_u[i] / u_norm) : u[i];
  for (int64_t i = begin + threadIdx.x; i < min(int64_t(layer.columns), begin + kStreamed); i += kThreads) {
    const int at = layer.place_in_v(int(i));
    static_cast<A*>(layer.new_v)[at] = usable ? static_cast<A>(of_v[i] / v_norm) : v[at];
  }
  if (!write) return;
  const A s = Scale<A>(sigma, static_cast<A>(target), at_most).value;
  const T* weight = static_cast<const T*>(layer.weight);
  T* out = static_cast<T*>(layer.out);
  const auto scale = [&](int64_t at, auto size) {
    constexpr int n = decltype(size)::value;
    const Pack<T, n> w = load<n>(weight + at);
    Pack<T, n> scaled;
#pragma unroll
    for (int i = 0; i < n; ++i) scaled.value[i] = static_cast<T>(static_cast<A>(w.value[i]) * s);
    store<n>(out + at, scaled);
  };
  const int64_t end = min(layer.numel(), begin + kStreamed);
  if (packed(weight, out)) for_each_pack<kPacked<T>>(begin, end, scale);
  else for_each_pack<1>(begin, end, scale);
}

// Some elements of <G, W>.
template <class T> __global__ void __launch_bounds__(kThreads) inner(const __grid_constant__ Layers layers) {
  using A = typename Accumulate<T>::type;
  const Layer& layer = layer_of_block(layers, kInner);
  const int64_t block = blockIdx.x - layer.first[kInner], begin = block * layer.inner_step();
  const T *weight = static_cast<const T*>(layer.weight), *grad = static_cast<const T*>(layer.grad);
  double total = 0;
  const auto multiply = [&](int64_t at, auto size) {
    constexpr int n = decltype(size)::value;
    const Pack<T, n> w = load<n>(weight + at), g = load<n>(grad + at);
    A sum = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) sum += static_cast<A>(g.value[i]) * static_cast<A>(w.value[i]);
    total += sum;  // in double: the terms have both signs and cancel
  };
  const int64_t end = min(layer.numel(), begin + layer.inner_step());
  if (packed(weight, grad)) for_each_pack<kPacked<T>>(begin, end, multiply);
  else for_each_pack<1>(begin, end, multiply);
  total = block_sum(total);
  if (threadIdx.x == 0) static_cast<double*>(layer.scratch)[block] = total;
}

// A rectangle of s G + s' <G, W> u v^T: a thread keeps its columns and goes down the rows.
template <class T>
__global__ void __launch_bounds__(kThreads) combine(const __grid_constant__ Layers layers, const double target, const bool at_most) {
  using A = typename Accumulate<T>::type;
  constexpr int P = kPacked<T>;
  const Layer& layer = layer_of_block(layers, kCombine);
  const int block = blockIdx.x - layer.first[kCombine], across = layer.rectangles_across(sizeof(T));
  const int begin = block / across * int(kRectangleRows), end = min(layer.rows, begin + int(kRectangleRows));
  const int column = block % across * (32 * P);
  const Scale<A> scale(*static_cast<const A*>(layer.sigma), static_cast<A>(target), at_most);
  const A k = scale.slope * static_cast<A>(total_of(static_cast<const double*>(layer.scratch), layer.inner_blocks()));
  const A *u = static_cast<const A*>(layer.u), *v = static_cast<const A*>(layer.v);
  const T* grad = static_cast<const T*>(layer.grad);
  T* out = static_cast<T*>(layer.out);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // k v of these columns; those of a lane's pack in parts that lie beside the other lanes', or banks would conflict.
  constexpr int M = kTogether<A>;
  __shared__ __align__(16) A of_column[P / M][32][M];
  for (int i = threadIdx.x; i < 32 * P; i += kThreads) {
    const int own = column + i / M % 32 * P + i / M / 32 * M + i % M;
    of_column[i / M / 32][i / M % 32][i % M] = own < layer.columns ? k * v[layer.place_in_v(own)] : A(0);
  }
  __syncthreads();
  if (layer.run % P == 0 && packed(grad, out)) {
    const int own = column + lane * P;
    if (own >= layer.columns) return;
    Pack<A, M> right[P / M];
#pragma unroll
    for (int part = 0; part < P / M; ++part) right[part] = load<M>(of_column[part][lane]);
#pragma unroll 4
    for (int row = begin + warp; row < end; row += kThreads / 32) {
      const int64_t place = layer.place(row, own);
      const Pack<T, P> g = load<P>(grad + place);
      const A left = u[row];
      Pack<T, P> result;
#pragma unroll
      for (int i = 0; i < P; ++i) result.value[i] = static_cast<T>(static_cast<A>(g.value[i]) * scale.value + left * right[i / M].value[i % M]);
      store<P>(out + place, result);
    }
    return;
  }
  for (int i = lane; i < min(layer.columns - column, 32 * P); i += 32) {
    const A right = of_column[i % P / M][i / P][i % M];
    for (int row = begin + warp; row < end; row += kThreads / 32) {
      const int64_t place = layer.place(row, column + i);
      out[place] = static_cast<T>(static_cast<A>(grad[place]) * scale.value + u[row] * right);
    }
  }
}

// Launches for layers of one dtype.
struct Group {
  const char* op;
  const std::vector<Layer>& layers;
  Stream stream;

  // kernel(layers, arguments...) with the blocks that each layer takes, for as many layers at a time as a launch can be told of.
  template <class K, class B, class... Arguments>
  void launch(Kernel number, K* kernel, int64_t shared, const B& blocks_of, Arguments... arguments) const {
    if (shared > 48 << 10)
      check_cuda(op, "can't have its shared memory", cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    for (size_t begin = 0; begin < layers.size(); begin += kLayers) {
      Layers some;
      some.count = int32_t(std::min<size_t>(kLayers, layers.size() - begin));
      int64_t blocks = 0;
      for (int i = 0; i < some.count; ++i) {
        some.layer[i] = layers[begin + i];
        some.layer[i].first[number] = grid_of(op, blocks);
        blocks += blocks_of(layers[begin + i]);
      }
      if (blocks == 0) continue;
      kernel<<<grid_of(op, blocks), kThreads, shared, stream>>>(some, arguments...);
      check_launch(op);
    }
  }
};

}  // namespace

int64_t shared_limit(int device) {
  int limit = 0;
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return limit - kStaticShared;
}

void launch_forward(const char* op, Dtype dtype, const std::vector<Layer>& layers, const Iteration& iteration, const Target& target, Stream stream) {
  const Group group{op, layers, stream};
  const bool v_first = iteration.v_first, iterate = iteration.count > 0;
  for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    using A = typename Accumulate<T>::type;
    int64_t shared = 0;
    for (const Layer& layer : layers) shared = larger(shared, shared_bytes(layer.own, layer.chunk, v_first, sizeof(T), sizeof(A)));
    for (int64_t step = 0; step < larger(1, iteration.count); ++step) {
      const bool first = step == 0, write = iteration.write && step + 1 >= iteration.count;
      group.launch(kProducts, products<T>, shared, [&](const Layer& layer) { return layer.product_blocks(v_first); }, v_first, first, iterate);
      if (iterate)
        group.launch(kReduce, reduce<A>, 0, [&](const Layer& layer) { return layer.reduce_blocks(v_first); }, v_first, iteration.eps);
      group.launch(kFinish, finish<T>, 0, [&](const Layer& layer) { return layer.finish_blocks(write); }, v_first, first, iterate, write,
                   iteration.eps, target.value, target.at_most);
    }
  });
}

void launch_backward(const char* op, Dtype dtype, const std::vector<Layer>& layers, const Target& target, Stream stream) {
  const Group group{op, layers, stream};
  for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    group.launch(kInner, inner<T>, 0, [](const Layer& layer) { return layer.inner_blocks(); });
    group.launch(kCombine, combine<T>, 0, [](const Layer& layer) { return layer.rectangles(sizeof(T)); }, target.value, target.at_most);
  });
}

}  // namespace fastgan::spectral_norm

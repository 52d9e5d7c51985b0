// Minibatch discrimination on CUDA: the math is in fastgan/ops/minibatch_discrimination.py.
//
// Few pairs are worked out twice, by `pairs`, for each of their samples: one launch. Many are worked out once, by `unordered_pairs`,
// and a second launch adds up what its warps leave. No atomics, and sums in fixed order: the same bits on every run.
//
// 16 bits become float on their way to shared memory, once per tile. Differences in pairs of 16 bits would be as exact as the
// results show, but cost more: a difference and its absolute value is one instruction for two components, and then each has to be
// turned into float to be added up, 2.5 instructions a component against 2 (docs/gpu.md).
#include "minibatch_discrimination.h"

#include "cuda.h"

namespace fastgan::minibatch_discrimination {
namespace {

constexpr int kLanes = 32, kWarps = 4, kThreads = kLanes * kWarps;
constexpr int kTile = 32, kShare = kTile / kWarps;  // samples j of a tile, and of a warp in it

// A block owns 32 samples i of one kernel k and one chunk of components; its lanes own rows, its warps share out the
// samples j of a tile. Tiles lie in shared memory as (j, component): a warp reads one j at a time, a broadcast. The warps'
// sums meet once at the end, in fixed order.
//
// What a kernel computes. Tangent: pairs count with e p instead of e. Components: also the sum with (g_i + g_j) and the signs.
template <typename T, int Chunk, bool Tangent, bool Components>
__global__ void __launch_bounds__(kThreads, 1)  // the 1: ptxas else spills a few bytes to reach its next step of occupancy
    pairs(const T* __restrict__ m,        // (B, K, D), and all the others are contiguous too
          const T* __restrict__ tangent,  // (B, K, D)
          const T* __restrict__ grad,     // (B, K)
          T* __restrict__ values,         // (B, K)
          T* __restrict__ gradient,       // (B, K, D)
          const int64_t B, const int64_t K, const int64_t D, const bool self_term, const bool packed) {
  using A = typename Accumulate<T>::type;
  constexpr int kSums = Components ? Chunk + 1 : 1;
  __shared__ union {
    struct {
      alignas(16) A m[kTile][Chunk], tangent[Tangent ? kTile : 1][Chunk], grad[kTile];
    } tile;
    A sums[kWarps - 1][kSums][kLanes];
  } shared;

  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t blocks = (B + kLanes - 1) / kLanes, chunks = (D + Chunk - 1) / Chunk;
  const int64_t i = blockIdx.x % blocks * kLanes + lane;
  const int64_t own = Components ? blockIdx.x / blocks % chunks : chunks - 1;
  const int64_t k = blockIdx.x / blocks / (Components ? chunks : 1);
  // P neighbouring components of a sample in one load, where their addresses allow it; 0 past the ends.
  constexpr int P = kTogether<A>;
  const auto bring = [&](const T* x, int64_t sample, int64_t d) {
    Pack<A, P> values = {};
    if (sample >= B || d >= D) return values;
    const T* from = x + (sample * K + k) * D + d;
    Pack<T, P> pack = {};
    if (packed) pack = load<P>(from);
#pragma unroll
    for (int i = 0; i < P; ++i) {
      if (!packed && d + i < D) pack.value[i] = from[i];
      values.value[i] = static_cast<A>(pack.value[i]);
    }
    return values;
  };
  const A g_i = Components && i < B ? static_cast<A>(grad[i * K + k]) : A(0);

  alignas(16) A row[Chunk], row_tangent[Chunk];
  A sums[kSums] = {};  // sums[Chunk], or the only one, is of values
  A& value = sums[kSums - 1];

  for (int64_t start = 0; start < B; start += kTile) {
    A distance[kShare] = {}, p[kShare] = {};
    for (int64_t step = 1; step <= chunks; ++step) {
      const int64_t chunk = (own + step) % chunks;  // the own one last: its tile and rows then stay for the sums below
      __syncthreads();
      for (int at = threadIdx.x * P; at < kTile * Chunk; at += kThreads * P) {
        const int64_t j = start + at / Chunk, d = chunk * Chunk + at % Chunk;
        store<P>(&shared.tile.m[at / Chunk][at % Chunk], bring(m, j, d));
        if constexpr (Tangent) store<P>(&shared.tile.tangent[at / Chunk][at % Chunk], bring(tangent, j, d));
      }
      if (Components && threadIdx.x < kTile) {
        const int64_t j = start + threadIdx.x;
        shared.tile.grad[threadIdx.x] = j < B ? static_cast<A>(grad[j * K + k]) : A(0);
      }
      if (start == 0 || chunks > 1) {
#pragma unroll
        for (int d = 0; d < Chunk; d += P) {
          store<P>(row + d, bring(m, i, chunk * Chunk + d));
          if constexpr (Tangent) store<P>(row_tangent + d, bring(tangent, i, chunk * Chunk + d));
        }
      }
      __syncthreads();
#pragma unroll
      for (int s = 0; s < kShare; ++s) {
        const int j = warp * kShare + s;
#pragma unroll
        for (int d = 0; d < Chunk; ++d) {  // components past D are 0 on both sides and change nothing
          const A difference = row[d] - shared.tile.m[j][d];
          distance[s] += fabs(difference);  // one instruction with the addition, which a comparison isn't
          if constexpr (Tangent) {
            const A sign = A(difference > 0) - A(difference < 0);
            p[s] += sign * (row_tangent[d] - shared.tile.tangent[j][d]);
          }
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kShare; ++s) {
      const int j = warp * kShare + s;
      if (start + j >= B) continue;
      A pair = exp(-distance[s]);
      if constexpr (Tangent) pair *= p[s];
      if (Tangent || Components || self_term || start + j != i) value += pair;
      if constexpr (Components) {
        const A weight = (g_i + shared.tile.grad[j]) * pair;
#pragma unroll
        for (int d = 0; d < Chunk; ++d) {
          const A difference = row[d] - shared.tile.m[j][d];
          sums[d] += weight * (A(difference > 0) - A(difference < 0));
        }
      }
    }
  }

  __syncthreads();
#pragma unroll
  for (int s = 0; s < kSums; ++s)
    if (warp) shared.sums[warp - 1][s][lane] = sums[s];
  __syncthreads();
  if (warp || i >= B) return;
#pragma unroll
  for (int s = 0; s < kSums; ++s)
    for (int other = 0; other < kWarps - 1; ++other) sums[s] += shared.sums[other][s][lane];
  // Every chunk's block has the value; one of them writes it.
  if ((Tangent || !Components) && own == (Components ? 0 : chunks - 1))
    values[i * K + k] = static_cast<T>(Tangent ? -value : value);
  if constexpr (Components) {
#pragma unroll
    for (int d = 0; d < Chunk; ++d)
      if (own * Chunk + d < D)
        gradient[(i * K + k) * D + own * Chunk + d] = static_cast<T>(Tangent ? sums[d] : -sums[d]);
  }
}

// What a warp of unordered_pairs has of 32 samples: by component, so that a thread takes four neighbouring samples at a time. A pack
// of components lies 8 samples on from the one before: 8 samples by 4 packs, which the warp brings together, meet no bank twice.
template <typename A, int Kinds> struct Tile {
  static constexpr int kChunk = 64 / sizeof(A), kPack = kTogether<A>;
  alignas(16) A x[Kinds][kChunk][kSide];
  A grad[kSide];

  static __device__ int place(int at, int d) { return (at + 8 * (d / kPack)) % kSide; }

  __device__ void take(A* to, int kind, int d, int at) const {
#pragma unroll
    for (int i = 0; i < 4; i += kPack) store<kPack>(to + i, load<kPack>(&x[kind][d][place(at, d) + i]));
  }
};

// N sums over the N lanes whose numbers differ in lane / Step % N: the lane gets number lane / Step % N of them.
template <int N, int Step, typename A> __device__ A fold(A (&sums)[N], int lane) {
#pragma unroll
  for (int half = N / 2; half; half /= 2) {
    const bool upper = lane & (half * Step);
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const A sent = upper ? sums[i] : sums[i + half], kept = upper ? sums[i + half] : sums[i];
      sums[i] = kept + __shfl_xor_sync(~0u, sent, half * Step);
    }
  }
  return sums[0];
}

template <typename A> __device__ A sign_of_difference(A a, A b) { return A(a > b) - A(a < b); }

// A block is a warp and has two parts of the samples of one k, or one part with itself (csrc/cuda/minibatch_discrimination.h). It works
// out tiles of 32 x 32 pairs, R rows by C columns to a thread, and adds what a pair comes to into sums of both its samples. Sums lie as
// (other part, K, components and value, samples): those of two parts are one warp's alone.
template <typename T, bool Tangent, bool Components>
__global__ void __launch_bounds__(kSide, sizeof(T) == 8 || Tangent ? 8 : Components ? 12 : 16)  // as many as registers allow
    unordered_pairs(const T* __restrict__ m, const T* __restrict__ tangent, const T* __restrict__ grad,
                    typename Accumulate<T>::type* partial, const int64_t B, const int64_t K, const int64_t D, const int64_t span,
                    const int parts, const bool self_term, const bool packed) {
  using A = typename Accumulate<T>::type;
  using Samples = Tile<A, Tangent ? 2 : 1>;
  constexpr int kChunk = Samples::kChunk, P = Samples::kPack;
  constexpr int R = 4, C = sizeof(A) == 8 ? 4 : 8;  // double has registers for half of a tile's columns at a time
  constexpr bool kValues = Tangent || !Components;
  __shared__ Samples rows, columns;

  const int lane = threadIdx.x, down = lane % 8, across = lane / 8;
  const int units = parts * (parts + 1) / 2, unit = blockIdx.x % units;
  const int part_i = unit % parts, part_j = (part_i + unit / parts) % parts;
  const bool one_part = part_i == part_j;
  const int64_t k = blockIdx.x / units, chunks = (D + kChunk - 1) / kChunk;
  const int64_t begin_i = part_i * span, end_i = min(B, begin_i + span), begin_j = part_j * span, end_j = min(B, begin_j + span);
  const int64_t padded = (B + kSide - 1) / kSide * kSide, sums = (Components ? D : 0) + kValues;

  // Columns lie in an order that has fold leave a lane with the same sample of a tile of columns as of a tile of rows: what the
  // lane adds to, nobody else does, and there is nothing to wait for.
  const int own = R * down + across;
  const auto sample_at = [](int at) { return at / 16 * 16 + at % 4 * 4 + at / 4 % 4; };
  A* const of_rows = partial + (part_j * K + k) * sums * padded + own;
  A* const of_columns = partial + (part_i * K + k) * sums * padded + own;
  const auto add = [](A* to, A value, bool first) { *to = first ? value : *to + value; };

  const auto bring_pack = [&](const T* x, A (&to)[kChunk][kSide], int64_t sample, int at, int64_t d, int place) {
    Pack<T, P> pack = {};
    if (sample < B && d < D) {
      const T* from = x + (sample * K + k) * D + d;
      if (packed) pack = load<P>(from);
      else
#pragma unroll
        for (int i = 0; i < P; ++i)
          if (d + i < D) pack.value[i] = from[i];
    }
#pragma unroll
    for (int i = 0; i < P; ++i) to[place + i][Samples::place(at, place)] = static_cast<A>(pack.value[i]);
  };
  const auto bring = [&](Samples& tile, int64_t start, int64_t chunk, bool in_order) {
    const int place = lane / 8 * P;
#pragma unroll 2  // more take registers that ptxas then spills
    for (int at = lane % 8; at < kSide; at += 8) {
      const int64_t sample = start + (in_order ? at : sample_at(at));
      bring_pack(m, tile.x[0], sample, at, chunk * kChunk + place, place);
      if constexpr (Tangent) bring_pack(tangent, tile.x[1], sample, at, chunk * kChunk + place, place);
    }
    if (Components && chunk == 0) {
      const int64_t sample = start + (in_order ? lane : sample_at(lane));
      tile.grad[lane] = sample < B ? static_cast<A>(grad[sample * K + k]) : A(0);
    }
  };

  for (int64_t i = begin_i; i < end_i; i += kSide) {
    A row_values[R] = {};
    for (int64_t j = one_part ? i : begin_j; j < end_j; j += kSide) {
      const bool first_j = j == (one_part ? i : begin_j), diagonal = i == j;  // a diagonal tile has its pairs twice, as rows
      const bool first_of_rows = first_j && (!one_part || i == begin_i), first_of_columns = i == begin_i;
      const int left_i = int(min(B - i, int64_t(kSide))), left_j = int(min(B - j, int64_t(kSide)));
      const bool without_self = diagonal && !self_term, masked = min(left_i, left_j) < kSide || without_self;
#pragma unroll 1
      for (int half = 0; half < 8 / C; ++half) {
        const bool keeps_row = own < left_i, keeps_column = own < left_j && !diagonal && (C == 8 || down / 4 == half);
        const auto position = [&](int c) { return (c / 4 + half) * 16 + 4 * across + c % 4; };
        const auto bring_chunk = [&](int64_t chunk) {
          const int count = int(min(D - chunk * kChunk, int64_t(kChunk)));
          if (half && chunks == 1) return count;
          __syncwarp();
          bring(columns, j, chunk, false);
          if (first_j || chunks > 1) bring(rows, i, chunk, true);
          __syncwarp();
          return count;
        };
        const auto take = [&](A* x, A* y, int kind, int d) {
          rows.take(x, kind, d, R * down);
#pragma unroll
          for (int c = 0; c < C; c += 4) columns.take(y + c, kind, d, position(c));
        };
        const auto fold_columns = [&](A (&of)[C]) {
          const A sum = fold<C, 1>(of, lane);
          return C == 8 ? sum : sum + __shfl_xor_sync(~0u, sum, 4);
        };

        A pair[R][C] = {}, slope[R][C] = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const int count = bring_chunk(chunk);
#pragma unroll 1
          for (int d = 0; d < count; ++d) {
            A x[R], y[C], t[R], u[C];
            take(x, y, 0, d);
            if constexpr (Tangent) take(t, u, 1, d);
#pragma unroll
            for (int r = 0; r < R; ++r)
#pragma unroll
              for (int c = 0; c < C; ++c) {
                pair[r][c] += fabs(x[r] - y[c]);
                if constexpr (Tangent) slope[r][c] += sign_of_difference(x[r], y[c]) * (t[r] - u[c]);
              }
          }
        }

        A column_values[C] = {};
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int c = 0; c < C; ++c) {
            A value = exp(-pair[r][c]);
            if constexpr (Tangent) value *= slope[r][c];
            A weight = value;
            if constexpr (Components) weight *= rows.grad[R * down + r] + columns.grad[position(c)];
            if (masked) {
              const int row = R * down + r, column = sample_at(position(c));
              if (row >= left_i || column >= left_j || (without_self && row == column)) value = weight = A(0);
            }
            row_values[r] += value, column_values[c] += value;
            pair[r][c] = weight;
          }
        if constexpr (kValues) {
          const A sum = fold_columns(column_values);
          if (keeps_column) add(of_columns + (sums - 1) * padded + j, sum, first_of_columns);
        }

        if constexpr (Components)
          for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {  // the last one is still there
            const int count = chunk == chunks - 1 ? int(D - chunk * kChunk) : bring_chunk(chunk);
            A *row_to = of_rows + chunk * kChunk * padded + i, *column_to = of_columns + chunk * kChunk * padded + j;
#pragma unroll 1
            for (int d = 0; d < count; ++d, row_to += padded, column_to += padded) {
              A x[R], y[C], to_rows[R] = {}, to_columns[C] = {};
              take(x, y, 0, d);
#pragma unroll
              for (int r = 0; r < R; ++r)
#pragma unroll
                for (int c = 0; c < C; ++c) {
                  const A sign = sign_of_difference(x[r], y[c]);
                  to_rows[r] = fma(pair[r][c], sign, to_rows[r]);
                  to_columns[c] = fma(pair[r][c], sign, to_columns[c]);
                }
              const A row = fold<R, 8>(to_rows, lane), column = fold_columns(to_columns);
              if (keeps_row) add(row_to, row, first_of_rows && half == 0);
              if (keeps_column) add(column_to, -column, first_of_columns);
            }
          }
      }
    }
    if constexpr (kValues) {
      const A sum = fold<R, 8>(row_values, lane);
      if (i + own < B) add(of_rows + (sums - 1) * padded + i, sum, !one_part || i == begin_i);
    }
  }
}

// The sums of all parts, in their order. A block has 32 samples of one k, a thread a few components, or the value, of one sample.
template <typename T, bool Tangent, bool Components>
__global__ void add_parts(const typename Accumulate<T>::type* __restrict__ partial, T* __restrict__ values,
                          T* __restrict__ gradient, const int64_t B, const int64_t K, const int64_t D, const int parts,
                          const bool packed) {
  using A = typename Accumulate<T>::type;
  constexpr int P = kTogether<A>;
  constexpr bool kValues = Tangent || !Components;
  const int64_t tiles = (B + kSide - 1) / kSide, padded = tiles * kSide, packs = Components ? (D + P - 1) / P : 0;
  const int64_t sums = (Components ? D : 0) + kValues, k = blockIdx.x / tiles, i = blockIdx.x % tiles * kSide + threadIdx.x % kSide;
  if (i >= B) return;
  for (int64_t share = threadIdx.x / kSide; share < packs + kValues; share += blockDim.x / kSide) {
    const int64_t d = share * P;
    if (share == packs) {
      A sum = 0;
      for (int part = 0; part < parts; ++part) sum += partial[((part * K + k) * sums + sums - 1) * padded + i];
      values[i * K + k] = static_cast<T>(Tangent ? -sum : sum);
    } else if constexpr (Components) {
      A sum[P] = {};
      for (int part = 0; part < parts; ++part)
#pragma unroll
        for (int p = 0; p < P; ++p)
          if (d + p < D) sum[p] += partial[((part * K + k) * sums + d + p) * padded + i];
      Pack<T, P> pack;
#pragma unroll
      for (int p = 0; p < P; ++p) pack.value[p] = static_cast<T>(Tangent ? sum[p] : -sum[p]);
      T* const to = gradient + (i * K + k) * D + d;
      if (packed) store<P>(to, pack);
      else
#pragma unroll
        for (int p = 0; p < P; ++p)
          if (d + p < D) to[p] = pack.value[p];
    }
  }
}

// May components of everything be read and written kTogether at a time?
template <typename T> bool packed(const Pairs& p) {
  constexpr int P = kTogether<typename Accumulate<T>::type>;
  const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % (P * sizeof(T)) == 0; };
  return p.D % P == 0 && aligned(p.m) && aligned(p.tangent) && aligned(p.gradient);
}

template <typename T, int Chunk, bool Tangent, bool Components>
void launch_pairs(const char* op, const Pairs& p, Stream stream) {
  const int64_t blocks = (p.B + kLanes - 1) / kLanes * p.K * (Components ? (p.D + Chunk - 1) / Chunk : 1);
  pairs<T, Chunk, Tangent, Components><<<grid_of(op, blocks), kThreads, 0, stream>>>(
      static_cast<const T*>(p.m), static_cast<const T*>(p.tangent), static_cast<const T*>(p.grad), static_cast<T*>(p.values),
      static_cast<T*>(p.gradient), p.B, p.K, p.D, p.self_term, packed<T>(p));
  check_launch(op);
}

template <typename T, bool Tangent, bool Components>
void launch_unordered(const char* op, const Pairs& p, const Cut& cut, void* scratch, Stream stream) {
  auto* const partial = static_cast<typename Accumulate<T>::type*>(scratch);
  unordered_pairs<T, Tangent, Components><<<grid_of(op, p.K * cut.units()), kSide, 0, stream>>>(
      static_cast<const T*>(p.m), static_cast<const T*>(p.tangent), static_cast<const T*>(p.grad), partial, p.B, p.K, p.D, cut.span,
      cut.parts, p.self_term, packed<T>(p));
  check_launch(op);
  add_parts<T, Tangent, Components><<<grid_of(op, p.K * tiles_of(p.B)), kSide * cut.adding_warps(p), 0, stream>>>(
      partial, static_cast<T*>(p.values), static_cast<T*>(p.gradient), p.B, p.K, p.D, cut.parts, packed<T>(p));
  check_launch(op);
}

}  // namespace

void launch(const char* op, const Pairs& p, const Cut& cut, void* scratch, Stream stream) {
  for_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto tangent, auto components) {
      constexpr bool kTangent = decltype(tangent)::value, kComponents = decltype(components)::value;
      if (cut.parts) launch_unordered<T, kTangent, kComponents>(op, p, cut, scratch, stream);
      else if (p.D <= 8) launch_pairs<T, 8, kTangent, kComponents>(op, p, stream);
      else launch_pairs<T, 16, kTangent, kComponents>(op, p, stream);
    };
    if (p.tangent) p.gradient ? run(std::true_type(), std::true_type()) : run(std::true_type(), std::false_type());
    else p.gradient ? run(std::false_type(), std::true_type()) : run(std::false_type(), std::false_type());
  });
}

}  // namespace fastgan::minibatch_discrimination

// Minibatch discrimination on CUDA: the math is in fastgan/ops/minibatch_discrimination.py.
//
// A block owns 32 samples i of one kernel k and one chunk of components; its lanes own rows, its warps share out the
// samples j of a tile. Tiles lie in shared memory as (j, component): a warp reads one j at a time, a broadcast. The warps'
// sums meet once at the end, in fixed order: no atomics, the same bits on every run.
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

template <typename T, int Chunk, bool Tangent, bool Components>
void launch_typed(const char* op, const Pairs& p, Stream stream) {
  const int64_t blocks = (p.B + kLanes - 1) / kLanes * p.K * (Components ? (p.D + Chunk - 1) / Chunk : 1);
  constexpr int P = kTogether<typename Accumulate<T>::type>;
  const auto packed = [&](const void* x) { return p.D % P == 0 && reinterpret_cast<uintptr_t>(x) % (P * sizeof(T)) == 0; };
  pairs<T, Chunk, Tangent, Components><<<grid_of(op, blocks), kThreads, 0, stream>>>(
      static_cast<const T*>(p.m), static_cast<const T*>(p.tangent), static_cast<const T*>(p.grad), static_cast<T*>(p.values),
      static_cast<T*>(p.gradient), p.B, p.K, p.D, p.self_term, packed(p.m) && packed(p.tangent));
  check_launch(op);
}

}  // namespace

void launch(const char* op, const Pairs& p, Stream stream) {
  for_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto tangent, auto components) {
      constexpr bool kTangent = decltype(tangent)::value, kComponents = decltype(components)::value;
      if (p.D <= 8) launch_typed<T, 8, kTangent, kComponents>(op, p, stream);
      else launch_typed<T, 16, kTangent, kComponents>(op, p, stream);
    };
    if (p.tangent) p.gradient ? run(std::true_type(), std::true_type()) : run(std::true_type(), std::false_type());
    else p.gradient ? run(std::false_type(), std::true_type()) : run(std::false_type(), std::false_type());
  });
}

}  // namespace fastgan::minibatch_discrimination

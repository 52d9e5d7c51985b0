// Minibatch discrimination on CUDA: the math is in fastgan/ops/minibatch_discrimination.py.
//
// A block owns 32 samples i of one kernel k and one chunk of components; its lanes own rows, its warps share out the
// samples j of a tile. Tiles lie in shared memory as (j, component): a warp reads one j at a time, a broadcast. The warps'
// sums meet once at the end, in fixed order: no atomics, the same bits on every run.
//
// 16 bits become float on their way to shared memory, once per tile. Differences in pairs of 16 bits would be as exact as the
// results show, but cost more: a difference and its absolute value is one instruction for two components, and then each has to be
// turned into float to be added up, 2.5 instructions a component against 2 (docs/gpu.md).
#include <algorithm>
#include <tuple>

#include "cuda.h"

namespace fastgan {
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

struct Call {
  const char* op;
  Tensor m;
  const Tensor *tangent = nullptr, *grad = nullptr;
  Tensor *values = nullptr, *gradient = nullptr;
  bool self_term = true;
};

Tensor prepared(const Call& call, const char* name, const Tensor& tensor, int64_t dims) {
  bool same = tensor.dim() == dims && tensor.scalar_type() == call.m.scalar_type() && tensor.device() == call.m.device();
  for (int64_t dim = 0; same && dim < dims; ++dim) same = tensor.size(dim) == call.m.size(dim);
  STD_TORCH_CHECK(same, "fastgan::", call.op, ": ", name, " has to have the device and dtype of m, and ",
                  dims == 3 ? "its shape" : "its first two dimensions");
  return torch::stable::contiguous(tensor);
}

template <typename T, int Chunk, bool Tangent, bool Components>
void launch(const Call& call, const Tensor& m, const Tensor& tangent, const Tensor& grad) {
  const int64_t B = m.size(0), K = m.size(1), D = m.size(2);
  const int64_t blocks = (B + kLanes - 1) / kLanes * K * (Components ? (D + Chunk - 1) / Chunk : 1);
  const auto in = [](const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); };
  const auto out = [](Tensor* tensor) { return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr; };
  constexpr int P = kTogether<typename Accumulate<T>::type>;
  const auto packed = [&](const T* x) { return D % P == 0 && reinterpret_cast<uintptr_t>(x) % (P * sizeof(T)) == 0; };
  const Device device(m);
  pairs<T, Chunk, Tangent, Components><<<grid_of(call.op, blocks), kThreads, 0, device.stream>>>(
      in(m), in(tangent), in(grad), out(call.values), out(call.gradient), B, K, D, call.self_term,
      packed(in(m)) && packed(in(tangent)));
  check_launch(call.op);
}

template <typename T, bool Tangent, bool Components>
void run_typed(const Call& call) {
  const Tensor m = torch::stable::contiguous(call.m);
  const Tensor tangent = Tangent ? prepared(call, "the tangent", *call.tangent, 3) : m;
  const Tensor grad = Components ? prepared(call, "grad", *call.grad, 2) : m;
  if (m.size(2) <= 8)
    launch<T, 8, Tangent, Components>(call, m, tangent, grad);
  else
    launch<T, 16, Tangent, Components>(call, m, tangent, grad);
}

// D of 0 has no components to copy and every distance 0.
template <bool Tangent, bool Components>
void run(const Call& call) {
  ++calls;
  const Tensor& m = call.m;
  if (m.size(0) * m.size(1) * m.size(2) == 0) {
    if (call.values) torch::stable::fill_(*call.values, Tangent ? 0 : m.size(0) - !call.self_term);
    return;
  }
  for_cuda_dtype(m.scalar_type(), [&](auto type) { run_typed<decltype(type), Tangent, Components>(call); });
}

Call describe(const char* op, const Tensor& m) {
  STD_TORCH_CHECK(m.dim() == 3, "fastgan::", op, ": m has ", m.dim(), " dimensions, expected (B, K, D)");
  return {op, m};
}

Tensor new_values(const Tensor& m) { return torch::stable::new_empty(m, {m.size(0), m.size(1)}); }

Tensor new_gradient(const Tensor& m) { return torch::stable::new_empty(m, {m.size(0), m.size(1), m.size(2)}); }

Tensor forward(const Tensor& m, bool self_term) {
  Call call = describe("minibatch_discrimination", m);
  Tensor values = new_values(m);
  call.values = &values, call.self_term = self_term;
  run<false, false>(call);
  return values;
}

Tensor backward(const Tensor& grad, const Tensor& m) {
  Call call = describe("minibatch_discrimination_backward", m);
  Tensor gradient = new_gradient(m);
  call.grad = &grad, call.gradient = &gradient;
  run<false, true>(call);
  return gradient;
}

Tensor jvp(const Tensor& t, const Tensor& m) {
  Call call = describe("minibatch_discrimination_jvp", m);
  Tensor values = new_values(m);
  call.tangent = &t, call.values = &values;
  run<true, false>(call);
  return values;
}

std::tuple<Tensor, Tensor> double_backward(const Tensor& v, const Tensor& grad, const Tensor& m) {
  Call call = describe("minibatch_discrimination_double_backward", m);
  Tensor values = new_values(m), gradient = new_gradient(m);
  call.tangent = &v, call.grad = &grad, call.values = &values, call.gradient = &gradient;
  run<true, true>(call);
  return {values, gradient};
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CUDA, library) {
  using namespace fastgan;
  library.impl("minibatch_discrimination", TORCH_BOX(&forward));
  library.impl("minibatch_discrimination_backward", TORCH_BOX(&backward));
  library.impl("minibatch_discrimination_jvp", TORCH_BOX(&jvp));
  library.impl("minibatch_discrimination_double_backward", TORCH_BOX(&double_backward));
}

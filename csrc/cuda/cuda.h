// Shared by the CUDA kernels.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "launch.h"

namespace fastgan {

// 16 bits are added up in float.
template <class T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };

// f(T()) for the type that dtype is.
template <class F> void for_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32: return f(float());
    case Dtype::float64: return f(double());
    case Dtype::float16: return f(__half());
    case Dtype::bfloat16: return f(__nv_bfloat16());
  }
}

inline void check_cuda(const char* op, const char* what, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("fastgan::") + op + " " + what + ": " + cudaGetErrorString(error));
}
inline void check_launch(const char* op) { check_cuda(op, "did not launch", cudaGetLastError()); }

inline unsigned grid_of(const char* op, int64_t blocks) {
  if (blocks >= int64_t(1) << 31)
    throw std::runtime_error(std::string("fastgan::") + op + " needs " + std::to_string(blocks) + " blocks, more than a grid holds");
  return unsigned(blocks);
}

// N neighbours in one load or store, of 16 bytes where N is kPacked.
template <class T, int N> struct alignas(sizeof(T) * N) Pack { T value[N]; };
template <class T> constexpr int kPacked = 16 / sizeof(T);
template <class A> constexpr int kTogether = 16 / sizeof(A);  // elements that a thread takes from shared memory at a time, as A

constexpr int kBlock = 256;

// Of the row cut into pieces of kElements that this block has: which, and from where to where.
struct Piece {
  int64_t row, begin, end;
  __device__ Piece(int64_t length, int64_t pieces)
      : row(blockIdx.x / pieces), begin(blockIdx.x % pieces * kElements), end(min(length, begin + kElements)) {}
};

// May these rows be read in 16 bytes? Each begins a multiple of its stride after the first.
template <class T> bool packs(const Strip& strip, int64_t rows) {
  return reinterpret_cast<uintptr_t>(strip.data) % 16 == 0 && (rows <= 1 || strip.stride * sizeof(T) % 16 == 0);
}

// f(at, pack of N or 1) for this thread's share of what lies between begin and end: whole packs, then what is left.
template <int N, class F> __device__ void for_each_pack(int64_t begin, int64_t end, const F& f) {
  const int64_t whole = begin + (end - begin) / N * N;
#pragma unroll 4
  for (int64_t at = begin + threadIdx.x * N; at < whole; at += kBlock * N) f(at, std::integral_constant<int, N>());
  if constexpr (N > 1)
    if (whole + threadIdx.x < end) f(whole + threadIdx.x, std::integral_constant<int, 1>());
}

template <int N, class F> __device__ void for_each_pack(const Piece& piece, const F& f) { for_each_pack<N>(piece.begin, piece.end, f); }

template <int N, class T> __device__ Pack<T, N> load(const T* from) { return *reinterpret_cast<const Pack<T, N>*>(from); }
template <int N, class T> __device__ void store(T* to, const Pack<T, N>& pack) { *reinterpret_cast<Pack<T, N>*>(to) = pack; }

// The sum over the block, for its first thread, always in the same order.
__device__ inline double block_sum(double value) {
  __shared__ double of_warp[kBlock / 32];
  for (int step = 16; step; step /= 2) value += __shfl_down_sync(~0u, value, step);
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  for (int warp = 1; threadIdx.x == 0 && warp < kBlock / 32; ++warp) value += of_warp[warp];
  return value;
}

}  // namespace fastgan

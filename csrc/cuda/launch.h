// What the two sides of a CUDA operator have in common: <op>.cpp, which knows tensors and no CUDA, and <op>.cu, which knows CUDA
// and no tensors, as nvcc would read torch's headers once per architecture. Plain C++.
#pragma once
#include <cstdint>

struct CUstream_st;

namespace fastgan {

using Stream = CUstream_st*;  // cudaStream_t
enum class Dtype { float32, float64, float16, bfloat16 };

// Rows of memory, `stride` elements apart.
struct Strip {
  const void* data;
  int64_t stride;

  template <class T> const T* in() const { return static_cast<const T*>(data); }
  template <class T> T* out() const { return const_cast<T*>(in<T>()); }  // of an Output
};

constexpr int64_t kElements = 8192;  // of a row, for one block: a multiple of every kPacked
inline int64_t pieces_of_row(int64_t length) { return length > kElements ? (length + kElements - 1) / kElements : 1; }

}  // namespace fastgan

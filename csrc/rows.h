// Tensors (N, ...) as N runs of memory, and their distribution over threads: for kernels that treat samples alike.
#pragma once
#include "common.h"

#include <algorithm>

namespace fastgan {

struct Rows {
  Tensor tensor;  // keeps the memory alive
  const void* data;
  int64_t count, length, stride;  // in elements

  explicit Rows(const Tensor& x) : tensor(x), data(x.const_data_ptr()), count(x.size(0)), length(1), stride(x.stride(0)) {
    for (int64_t dim = 1; dim < x.dim(); ++dim) length *= x.size(dim);
  }
  // x with its rows laid out as those of like, copied if they aren't.
  static Rows like(const Tensor& x, const Tensor& like) { return Rows(same_rows(x, like) ? x : laid_out_as(x, like)); }

  template <class S> const S* in(int64_t row) const { return static_cast<const S*>(data) + row * stride; }
  template <class S> S* out(int64_t row) const { return const_cast<S*>(in<S>(row)); }  // of an Output
};

// An output like x. Where its rows are scattered, results go to a contiguous tensor first.
struct Output {
  Tensor result, work;

  explicit Output(const Tensor& x) : result(new_tensor_like(x)), work(result) {
    if (has_dense_rows(result)) return;
    work = new_tensor(x, x.sizes());
  }
  Tensor finish() {
    if (work.get() != result.get()) torch::stable::copy_(result, work);
    return result;
  }
};

// f(row, begin, end) for pieces of rows that follow from the shape alone: what f sums up over a piece doesn't depend on the
// number of threads.
constexpr int64_t kPiece = 1 << 14;
inline int64_t pieces_of(int64_t length) { return std::max<int64_t>(1, (length + kPiece - 1) / kPiece); }

template <class F> void for_each_piece(int64_t count, int64_t length, const F& f) {
  const int64_t pieces = pieces_of(length), grain = 1 + 2 * kPiece / std::max<int64_t>(1, std::min(length, kPiece));
  torch::stable::parallel_for(0, count * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kPiece;
      f(i / pieces, first, std::min(length, first + kPiece));
    }
  });
}

}  // namespace fastgan

// Minibatch standard deviation on CUDA: its launches, and how their work is cut. Plain C++, so that tests can cut it without a GPU.
#pragma once
#include <initializer_list>

#include "launch.h"

namespace fastgan::minibatch_stddev {

constexpr int64_t kThreads = 256;  // of a block
constexpr int64_t kKept = 8;       // samples of a group that stay in registers
constexpr int64_t kShare = 1024;   // elements appended to the samples of a group, for one block
// Positions of a thread, in one load where their addresses allow it: of more its sums, of 32 bits at least, don't fit registers.
constexpr int pack_of(int64_t bytes) { return bytes < 8 ? 4 : 1; }  // of doubles, kernels for packs would be the largest of all

// Strides in elements, of samples and of places.
struct Samples {
  const void* data = nullptr;
  int64_t sample = 0, place = 0;
};

// With a tangent v passes instead of x, and covariances with it are appended; grad comes with a gradient to write.
struct Tensors {
  Samples x, v, grad, values, gradient;
};

// The first `larger` groups have a sample more than `size`. Positions are the places of a slice's channels; they lie in runs of memory
// of length `run`: one, or one for each place. Slices are `run` apart, channels `channel`.
struct Problem {
  int64_t groups, size, larger;
  int64_t slices, places, positions, run, channel;
  double eps;
  bool strided, unbiased;

  int64_t units() const { return groups * slices; }
  int64_t largest() const { return size + (larger > 0); }
};

// Into blocks: of a slice's positions pieces, with `pack` positions a thread; of what is appended to a group's samples shares.
struct Cut {
  int64_t pack, pieces, shares;

  Cut(const Problem& p, const Tensors& tensors, int64_t bytes) : pack(pack_of(bytes)) {
    for (const Samples& of : {tensors.x, tensors.v, tensors.grad, tensors.values, tensors.gradient})
      if (of.data && (reinterpret_cast<uintptr_t>(of.data) % (pack * bytes) || of.sample % pack || (p.run < p.positions && of.place % pack)))
        pack = 1;
    if (p.run % pack) pack = 1;
    pieces = (p.positions + kThreads * pack - 1) / (kThreads * pack);
    shares = (p.largest() * p.places + kShare - 1) / kShare;
  }
  // What reached one share, the blocks that need it add up themselves.
  bool adds_before(const Tensors& tensors) const { return tensors.gradient.data && shares > 1; }
  // Numbers in scratch memory: one for each piece where values are written, then one for each share that is added up before.
  int64_t parts(const Problem& p, const Tensors& tensors) const { return tensors.values.data ? p.units() * pieces : 0; }
  int64_t scratch(const Problem& p, const Tensors& tensors) const {
    return parts(p, tensors) + (adds_before(tensors) ? p.units() * shares : 0);
  }
};

void launch(const char* op, Dtype dtype, const Problem& problem, const Tensors& tensors, const Cut& cut, double* scratch, Stream stream);

}  // namespace fastgan::minibatch_stddev

// Minibatch discrimination on CUDA: its launches, and how their work is cut. Plain C++, so that tests can cut it without a GPU.
#pragma once
#include <algorithm>

#include "launch.h"

namespace fastgan::minibatch_discrimination {

// m, tangent and gradient are (B, K, D), grad and values (B, K), contiguous and not empty. Null are inputs that an operator doesn't
// have and outputs that it isn't asked for: with a tangent pairs count with e p instead of e, with a gradient signs are added up.
struct Pairs {
  Dtype dtype;
  int64_t B, K, D;
  const void *m, *tangent, *grad;
  void *values, *gradient;
  bool self_term;
};

constexpr int64_t kSide = 32;       // samples of a tile
constexpr double kTwice = 1 << 25;  // B B K D below which a second launch costs more than half of the pairs (docs/gpu.md)
constexpr int64_t kUnits = 2048;    // warps that fill a GPU
constexpr int64_t kScratch = 48'000'000;  // bytes, if four parts don't need more

inline int64_t tiles_of(int64_t B) { return (B + kSide - 1) / kSide; }

// Samples in parts of `span`, for kernels that work every pair out once; no parts: every pair twice. A warp has two parts of one k,
// or one part with itself, and leaves sums for each of their samples: every sample gets as many as there are parts.
struct Cut {
  int parts = 0;
  int64_t span = 0, scratch = 0;  // bytes of all sums

  Cut() = default;
  explicit Cut(const Pairs& p) {
    if (p.B <= kSide || double(p.B) * p.B * p.K * p.D < kTwice) return;
    const int64_t tiles = tiles_of(p.B), of_part = p.K * sums(p) * tiles * kSide * (p.dtype == Dtype::float64 ? 8 : 4);
    const int64_t most = std::min(tiles, std::max(kScratch / of_part, int64_t(4)));
    for (parts = 1; parts < most && p.K * units() < kUnits;) ++parts;
    span = (tiles + parts - 1) / parts * kSide;
    parts = int((p.B + span - 1) / span);
    scratch = of_part * parts;
  }
  int64_t units() const { return int64_t(parts) * (parts + 1) / 2; }

  static int64_t sums(const Pairs& p) { return (p.gradient ? p.D : 0) + (p.values ? 1 : 0); }
  // Warps of a block that adds up: one for a pack of components, or the value, up to eight.
  static int adding_warps(const Pairs& p) {
    const int64_t pack = p.dtype == Dtype::float64 ? 2 : 4;
    return int(std::min((p.gradient ? (p.D + pack - 1) / pack : 0) + (p.values ? 1 : 0), int64_t(8)));
  }
};

void launch(const char* op, const Pairs& pairs, const Cut& cut, void* scratch, Stream stream);

}  // namespace fastgan::minibatch_discrimination

// Minibatch discrimination on CUDA: its launch. Plain C++.
#pragma once
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
void launch(const char* op, const Pairs& pairs, Stream stream);

}  // namespace fastgan::minibatch_discrimination

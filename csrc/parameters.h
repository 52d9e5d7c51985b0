// What operators are told beside their tensors. Plain C++: CUDA's kernels read it too.
#pragma once
#include <cstdint>

namespace fastgan {

// A gradient penalty as a function of the norms of `count` samples.
enum class Kind { gradient_penalty, zero_centered, power, max };
struct Form {
  Kind kind;
  double weight, target;
  bool one_sided;
  double power, count;
};

// Power iterations on a matrix W: which of u and v is updated first, and whether W / sigma is wanted beside sigma.
struct Iteration {
  int64_t count;
  double eps;
  bool v_first, write = true;
};

// What W's spectral norm is brought to: target, or no more than that.
struct Target {
  double value;
  bool at_most;
};

}  // namespace fastgan

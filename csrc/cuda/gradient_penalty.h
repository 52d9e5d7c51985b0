// Gradient penalties on CUDA: their launches. Plain C++.
#pragma once
#include "launch.h"
#include "parameters.h"

namespace fastgan::gradient_penalty {

// `rows` rows of `length` elements, and numbers in `sums` for count * pieces_of_row(length) pieces of them; the penalty, norms and
// factors are in double for float64, else in float.
void launch_norms(Dtype dtype, Strip grads, int64_t rows, int64_t length, const Form& form, double* sums, void* penalty, void* norms, void* factors,
                  Stream stream);
void launch_scale(const char* op, Dtype dtype, Strip grads, Strip factors, Strip out, int64_t rows, int64_t length, Stream stream);

}  // namespace fastgan::gradient_penalty

// tangent_combine on CUDA: its launch. Plain C++.
#pragma once
#include "launch.h"

namespace fastgan::tangent_combine {

// Rows of `length` elements; passed and combined have one stride. Factors are in double for float64, else in float.
void launch(Dtype dtype, Strip t, Strip a, Strip factors, Strip passed, Strip combined, int64_t rows, int64_t length, double slope, Stream stream);

}  // namespace fastgan::tangent_combine

// Shared by all native kernels.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <cstdint>

namespace fastgan {

// Instruction sets for CPU kernels, chosen at run time: one binary serves every x86-64 (and, as baseline, any) processor.
enum class Isa { baseline, avx2, avx512 };
Isa isa();

// Counts kernels that ran, so that tests can tell native code from a silent fallback. Every native kernel increments it.
extern std::atomic<int64_t> calls;

}  // namespace fastgan

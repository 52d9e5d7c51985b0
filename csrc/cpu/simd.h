// Compiles one source per instruction set. A kernel file says
//
//     #define FASTGAN_SIMD_SOURCE "spectral_norm.inl"
//     #include "simd.h"
//
// and finds what that source defines in the namespaces baseline, avx2 and avx512 (the last two on x86-64 only), each
// compiled for its processors and with simd.inl's vectors of its width. FASTGAN_FOR_ISA(f) is the f to run here.
//
// The source must not instantiate templates of the standard library or of torch: the linker keeps one copy of such a
// function per program, and it could be the one that only AVX-512 machines can run.
#pragma once
#include "common.h"

#include <cmath>
#include <cstring>

#define FASTGAN_INLINE static inline __attribute__((always_inline))

// The vectors in signatures never leave inlined code, so the ABI that GCC would warn of plays no part.
#pragma GCC diagnostic ignored "-Wpsabi"

#define FASTGAN_ISA 0
namespace fastgan { namespace { namespace baseline {
#include "simd.inl"
#include FASTGAN_SIMD_SOURCE
}}}
#undef FASTGAN_ISA

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define FASTGAN_ISA 2
namespace fastgan { namespace { namespace avx2 {
#include "simd.inl"
#include FASTGAN_SIMD_SOURCE
}}}
#undef FASTGAN_ISA
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define FASTGAN_ISA 512
namespace fastgan { namespace { namespace avx512 {
#include "simd.inl"
#include FASTGAN_SIMD_SOURCE
}}}
#undef FASTGAN_ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define FASTGAN_FOR_ISA(...)                                   \
  (::fastgan::isa() == ::fastgan::Isa::avx512 ? avx512::__VA_ARGS__ \
   : ::fastgan::isa() == ::fastgan::Isa::avx2 ? avx2::__VA_ARGS__   \
                                              : baseline::__VA_ARGS__)
#else
#define FASTGAN_FOR_ISA(...) (baseline::__VA_ARGS__)
#endif

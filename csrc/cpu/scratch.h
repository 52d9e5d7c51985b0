// Scratch memory of kernels: not initialised, and aligned for the widest vectors.
#pragma once
#include <cstdint>
#include <memory>
#include <new>

namespace fastgan {

constexpr std::align_val_t kScratchAlignment{64};

struct FreeScratch {
  void operator()(void* p) const { ::operator delete(p, kScratchAlignment); }
};
template <class T> using Scratch = std::unique_ptr<T[], FreeScratch>;
template <class T> Scratch<T> allocate(int64_t count) {
  return Scratch<T>(static_cast<T*>(::operator new(sizeof(T) * count, kScratchAlignment)));
}

}  // namespace fastgan

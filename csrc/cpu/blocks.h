// Large results in memory that earlier results have let go of. glibc hands blocks above a threshold back to the kernel, and
// the next result pays a page fault for every 4 KiB: several times what computing it costs.
//
// A block belongs to one tensor's storage until that is destroyed, as with any allocator: whatever still refers to a result (a
// graph kept for another backward, a view, .grad) keeps its memory from being used again. Blocks in use and blocks kept
// together never hold more bytes than were in use at once at some time.
#pragma once
#include "common.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <new>
#include <vector>

namespace fastgan {

constexpr int64_t kReusedFrom = 1 << 17;  // bytes; glibc's threshold

class Blocks {
 public:
  static Blocks& all() {
    static Blocks& blocks = *new Blocks;  // never destroyed: tensors may outlive static objects
    return blocks;
  }

  void* take(int64_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      used_ += bytes, most_ = std::max(most_, used_);
      const auto found = std::find_if(kept_.rbegin(), kept_.rend(), [&](const Block& block) { return block.bytes == bytes; });
      if (found != kept_.rend()) {
        void* data = found->data;
        kept_bytes_ -= bytes;
        kept_.erase(std::next(found).base());
        if (poison_) std::memset(data, 0xff, bytes);
        return data;
      }
      while (!kept_.empty() && used_ + kept_bytes_ > most_) {
        kept_bytes_ -= kept_.front().bytes;
        ::operator delete(kept_.front().data, kAlignment);
        kept_.pop_front();
      }
    }
    try {
      void* data = ::operator new(bytes, kAlignment);
      if (poison_) std::memset(data, 0xff, bytes);
      return data;
    } catch (...) {
      const std::lock_guard lock(mutex_);
      used_ -= bytes;
      throw;
    }
  }

  void give_back(void* data, int64_t bytes) {
    const std::lock_guard lock(mutex_);
    used_ -= bytes, kept_bytes_ += bytes;
    kept_.push_back({data, bytes});
  }

 private:
  struct Block {
    void* data;
    int64_t bytes;
  };
  static constexpr std::align_val_t kAlignment{64};

  // Where glibc is told to fill what it hands out, so are these, with NaN: a kernel that doesn't write everything is caught.
  const bool poison_ = std::getenv("MALLOC_PERTURB_") != nullptr;
  std::mutex mutex_;
  std::deque<Block> kept_;  // by when they were let go
  int64_t used_ = 0, kept_bytes_ = 0, most_ = 0;
};

// Uninitialised, with the dtype, shape and, where it is dense, strides of x, which is on the CPU.
inline torch::stable::Tensor new_like(const torch::stable::Tensor& x) {
  const int64_t bytes = x.numel() * x.element_size();
  if (bytes < kReusedFrom || !is_dense(x)) return new_tensor_like(x);
  void* data = Blocks::all().take(bytes);
  const auto give_back = [bytes](void* block) { Blocks::all().give_back(block, bytes); };
  try {
    return torch::stable::from_blob(data, x.sizes(), x.strides(), x.device(), x.scalar_type(), give_back);
  } catch (...) {
    give_back(data);
    throw;
  }
}

}  // namespace fastgan

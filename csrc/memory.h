// Memory for the kernels: huge pages for fresh outputs, per-thread scratch.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace kdfast {

// Asks for huge pages on the whole pages of a large buffer that nobody has written yet: a fresh 80 MB tensor then costs
// 4 ms to fill instead of 17 (page faults). No effect where unsupported or on small buffers.
void advise_huge(void* address, std::size_t bytes);

// Large buffers that are handed to the caller as tensors and come back when the last of them is freed. The next call then
// writes to pages that exist already: the system's allocator unmaps a freed gradient of 65 MB, and zeroing fresh pages costs
// as much as the whole loss. Idle buffers stay within `limit` bytes, the oldest goes first, and the kernel may take their
// pages when memory is short (MADV_FREE).
class KeptMemory {
 public:
  static KeptMemory& instance();  // never destroyed: tensors may outlive everything

  void* take(std::size_t bytes);  // throws std::bad_alloc
  void give(void* address);       // from any thread, without Python

  void set_limit(std::size_t bytes);
  std::size_t limit() const { return limit_; }
  std::size_t idle();     // bytes kept for the next call
  void release();         // frees every idle buffer

 private:
  struct Block {
    void* address;
    std::size_t size;
  };
  void shrink(std::size_t target);

  std::mutex mutex_;
  std::vector<Block> idle_, out_;  // idle: oldest first
  std::size_t idle_bytes_ = 0;
  std::atomic<std::size_t> limit_{0};
};

// At least `bytes` of 64-byte aligned scratch of this thread, kept for the next call on it.
// `slot` (0..7) separates buffers that live at the same time.
void* thread_scratch(int slot, std::size_t bytes);

// Bytes of second-level cache of a core (1 MB where the system does not tell).
std::int64_t second_level_cache();

}  // namespace kdfast

#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace kdfast {

constexpr std::size_t kHuge = std::size_t{2} << 20;

void advise_huge(void* address, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < 2 * kHuge) return;
  const auto begin = (reinterpret_cast<std::uintptr_t>(address) + kHuge - 1) & ~(kHuge - 1);
  const auto end = (reinterpret_cast<std::uintptr_t>(address) + bytes) & ~(kHuge - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address;
  (void)bytes;
#endif
}

namespace {
// Straight from the system: pages of malloc's heap may be small ones that somebody touched before.
void* map(std::size_t size) {
#if defined(__linux__)
  char* reserved = static_cast<char*>(mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (reserved == MAP_FAILED) throw std::bad_alloc();
  const std::size_t before = (kHuge - reinterpret_cast<std::uintptr_t>(reserved) % kHuge) % kHuge;
  if (before) munmap(reserved, before);
  munmap(reserved + before + size, kHuge - before);
  advise_huge(reserved + before, size);
  return reserved + before;
#else
  void* address = std::aligned_alloc(kHuge, size);
  if (!address) throw std::bad_alloc();
  return address;
#endif
}

void unmap(void* address, std::size_t size) {
#if defined(__linux__)
  munmap(address, size);
#else
  (void)size;
  std::free(address);
#endif
}
}  // namespace

KeptMemory& KeptMemory::instance() {
  static KeptMemory* memory = [] {
    auto* made = new KeptMemory;
#if defined(__unix__) || defined(__APPLE__)
    // A child forked while another thread holds the lock would wait for ever.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); }, [] { instance().mutex_.unlock(); });
#endif
    return made;
  }();
  return *memory;
}

void* KeptMemory::take(std::size_t bytes) {
  const std::size_t size = std::max(kHuge, (bytes + kHuge - 1) & ~(kHuge - 1));
  {
    std::lock_guard<std::mutex> lock(mutex_);
    // The smallest that fits and is not more than half too large; of equal ones the latest, whose pages are warm.
    auto best = idle_.end();
    for (auto block = idle_.begin(); block != idle_.end(); ++block) {
      if (block->size >= size && block->size <= size + size / 2 && (best == idle_.end() || block->size <= best->size)) best = block;
    }
    if (best != idle_.end()) {
      const Block block = *best;
      idle_.erase(best);
      idle_bytes_ -= block.size;
      out_.push_back(block);
      return block.address;
    }
  }
  void* address = map(size);
  std::lock_guard<std::mutex> lock(mutex_);
  out_.push_back({address, size});
  return address;
}

void KeptMemory::give(void* address) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = std::find_if(out_.begin(), out_.end(), [&](const Block& block) { return block.address == address; });
  if (found == out_.end()) return;
  const Block block = *found;
  *found = out_.back();
  out_.pop_back();
  if (block.size > limit_) return unmap(block.address, block.size);
  shrink(limit_ - block.size);
  idle_.push_back(block);
  idle_bytes_ += block.size;
#if defined(__linux__) && defined(MADV_FREE)
  madvise(block.address, block.size, MADV_FREE);
#endif
}

void KeptMemory::shrink(std::size_t target) {
  while (idle_bytes_ > target) {
    idle_bytes_ -= idle_.front().size;
    unmap(idle_.front().address, idle_.front().size);
    idle_.erase(idle_.begin());
  }
}

void KeptMemory::set_limit(std::size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  limit_ = bytes;
  shrink(bytes);
}

std::size_t KeptMemory::idle() {
  std::lock_guard<std::mutex> lock(mutex_);
  return idle_bytes_;
}

void KeptMemory::release() {
  std::lock_guard<std::mutex> lock(mutex_);
  shrink(0);
}

namespace {
struct Buffer {
  void* data = nullptr;
  std::size_t size = 0;
  ~Buffer() { std::free(data); }
};
}  // namespace

void* thread_scratch(int slot, std::size_t bytes) {
  thread_local Buffer buffers[8];
  Buffer& buffer = buffers[slot];
  if (buffer.size < bytes) {
    std::free(buffer.data);
    const std::size_t size = (bytes + 4095) & ~std::size_t{4095};
    buffer.data = std::aligned_alloc(64, size);
    buffer.size = buffer.data ? size : 0;
    // A kernel runs inside torch's pool, where nothing may be thrown; scratch is a few rows, so this is out of memory for good.
    if (!buffer.data) std::abort();
  }
  return buffer.data;
}

std::int64_t second_level_cache() {
  static const std::int64_t bytes = [] {
    long size = 0;
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
    size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return size > 0 ? std::int64_t{size} : std::int64_t{1} << 20;
  }();
  return bytes;
}

}  // namespace kdfast

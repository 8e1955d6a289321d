#include "memory.h"

#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace kdfast {

void advise_huge(void* address, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::size_t huge = std::size_t{2} << 20;
  if (bytes < 2 * huge) return;
  const auto begin = (reinterpret_cast<std::uintptr_t>(address) + huge - 1) & ~(huge - 1);
  const auto end = (reinterpret_cast<std::uintptr_t>(address) + bytes) & ~(huge - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address;
  (void)bytes;
#endif
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

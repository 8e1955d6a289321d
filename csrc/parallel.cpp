#include "parallel.h"

#include <algorithm>
#include <thread>
#include <vector>

namespace kdfast {

static TorchParallelFor torch_pool = nullptr;
static bool serial = false;

void set_parallel(TorchParallelFor function) {
  torch_pool = function;
  serial = false;
}

void set_serial() {
  torch_pool = nullptr;
  serial = true;
}

const char* pool_name() { return serial ? "serial" : torch_pool ? "torch" : "std::thread"; }

static void own_threads(int64_t n, int64_t grain, RangeFunction function, void* context) {
  const int64_t wanted = std::min<int64_t>(std::max(1u, std::thread::hardware_concurrency()), (n + grain - 1) / grain);
  if (wanted <= 1) return function(0, n, context);
  const int64_t step = (n + wanted - 1) / wanted;
  std::vector<std::thread> threads;
  for (int64_t begin = step; begin < n; begin += step) {
    threads.emplace_back(function, begin, std::min(begin + step, n), context);
  }
  function(0, std::min(step, n), context);
  for (auto& thread : threads) thread.join();
}

void parallel_ranges(int64_t n, int64_t grain, RangeFunction function, void* context) {
  if (n <= 0) return;
  if (serial || n <= grain) return function(0, n, context);
  if (!torch_pool) return own_threads(n, grain, function, context);
  // A failing pool may have run part of the ranges; every range only writes its own outputs, so running all again is safe.
  if (torch_pool(0, n, grain, function, context) != 0) function(0, n, context);
}

}  // namespace kdfast

// One launch whose blocks wait for each other (grid barriers of cooperative_groups.h) instead of several launches. All blocks must
// then be resident at once, so the device decides how many there are: kernels loop over their work by gridDim.
// A cooperative launch can be captured in a CUDA graph, and the barrier's memory is the driver's: nothing to reset.
#pragma once

#include <algorithm>
#include <map>
#include <tuple>

#include "cuda/launch.h"

namespace kdfast {
namespace cuda {

// Blocks of a kernel that the current device holds at once.
template <class... Parameters>
inline int64_t resident_blocks(void (*kernel)(Parameters...), unsigned threads, std::size_t shared) {
  static thread_local std::map<std::tuple<int, const void*, unsigned, std::size_t>, int64_t> known;  // asking costs microseconds
  int device = 0, processors = 0, each = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  int64_t& blocks = known[{device, reinterpret_cast<const void*>(kernel), threads, shared}];
  if (blocks == 0) {
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, int(threads), shared), "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    blocks = int64_t(processors) * each;
  }
  return blocks;
}

// At most `blocks` blocks, fewer where the device holds fewer.
template <class... Parameters, class... Arguments>
inline void launch_together(const char* name, void (*kernel)(Parameters...), int64_t blocks, unsigned threads, std::size_t shared,
                            cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(std::max<int64_t>(1, std::min(blocks, resident_blocks(kernel, threads, shared)))));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

}  // namespace cuda
}  // namespace kdfast

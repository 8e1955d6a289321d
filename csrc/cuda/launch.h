// What every CUDA kernel's launcher needs: the stream as Python hands it over, and a failed launch that names its kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace kdfast {
namespace cuda {

// `current_stream().cuda_stream` of torch; 0 is the default stream.
inline cudaStream_t stream_of(std::uintptr_t address) { return reinterpret_cast<cudaStream_t>(address); }

// Throws, naming what failed.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error of a launch stays until it is read, and would be blamed on the next one
  throw std::runtime_error(std::string("kdfast CUDA: ") + what + " failed: " + cudaGetErrorString(error) + " (error " +
                           std::to_string(int(error)) + ")");
}

// Makes a device the current one for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

// Runs `blocks` blocks, all on grid.x (y and z stop at 65535), in clusters of `cluster`. The stream must belong to the current
// device: Python launches under torch.cuda.device(tensor.device).
template <class... Parameters, class... Arguments>
inline void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, unsigned threads, std::size_t shared,
                   cudaStream_t stream, unsigned cluster, Arguments... arguments) {
  if (blocks > INT32_MAX) throw std::invalid_argument(std::string("kdfast CUDA: ") + name + ": more than 2^31 - 1 blocks");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  if (cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

}  // namespace cuda
}  // namespace kdfast

#include "cuda/machine.h"

#include "cuda/launch.h"

namespace kdfast {
namespace cuda {

// Never launched: the runtime finds its code exactly where it finds that of the other kernels.
__global__ void probe_kernel() {}

Device device(int index) {
  Device found;
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, index), "cudaDeviceGetAttribute");
  found.capability = major * 10 + minor;
  const OnDevice current(index);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error != cudaSuccess) {
    cudaGetLastError();
    found.reason = std::string("this build has no code for compute capability ") + std::to_string(major) + "." + std::to_string(minor) +
                   " (" + cudaGetErrorString(error) + ")";
  }
  return found;
}

}  // namespace cuda
}  // namespace kdfast

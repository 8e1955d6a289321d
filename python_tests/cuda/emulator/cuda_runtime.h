// Stands in for CUDA's header of this name when g++ compiles a kernel source for the emulator (emulator.h): the language, the
// intrinsics and the part of the runtime API that csrc/cuda uses. What is missing here does not compile: add it.
#pragma once

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>

#include "emulator.h"

#define KDFAST_CUDA_EMULATED 1

// ---------------------------------------------------------------- language
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local
#define warpSize 32

#define KD_VECTOR_TYPE(T, name, bytes)                                                                            \
  struct __align__(bytes < 16 ? bytes : 16) name##2 { T x, y; };                                                 \
  struct __align__(2 * bytes < 16 ? 2 * bytes : 16) name##4 { T x, y, z, w; };                                   \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                                     \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
KD_VECTOR_TYPE(float, float, 8)
KD_VECTOR_TYPE(double, double, 16)
KD_VECTOR_TYPE(int, int, 8)
KD_VECTOR_TYPE(unsigned, uint, 8)
KD_VECTOR_TYPE(unsigned short, ushort, 4)

// ---------------------------------------------------------------- threads that meet
inline void __syncthreads(int line = __builtin_LINE()) {
  ::emulator::Block& b = *::emulator::current->block;
  ::emulator::meet(b.barrier, int(b.threads.size()), "__syncthreads", line);
}
inline int __syncthreads_or(int p, int line = __builtin_LINE()) { return ::emulator::vote(p != 0, "__syncthreads_or", line) != 0; }
inline int __syncthreads_count(int p, int line = __builtin_LINE()) { return ::emulator::vote(p != 0, "__syncthreads_count", line); }
inline int __syncthreads_and(int p, int line = __builtin_LINE()) {
  return ::emulator::vote(p != 0, "__syncthreads_and", line) == int(::emulator::current->block->threads.size());
}
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { ::emulator::exchange(mask, 0, "__syncwarp", line); }
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace emulator {
template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
T shuffle(unsigned mask, T value, int from, const char* what, int line) {
  const uint64_t* values = exchange(mask, pack(value), what, line);
  if (!(mask >> from & 1)) fail(std::string(what) + " reads a lane outside its mask");
  return unpack<T>(values[from]);
}
inline int lane() { return current->linear % kWarp; }
template <class T, class F>
T reduce(unsigned mask, T value, const char* what, int line, F f) {
  const uint64_t* values = exchange(mask, pack(value), what, line);
  bool first = true;
  T all{};
  for (int i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    all = first ? unpack<T>(values[i]) : f(all, unpack<T>(values[i]));
    first = false;
  }
  return all;
}
}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T v, int from, int width = 32, int line = __builtin_LINE()) {
  return emulator::shuffle(mask, v, emulator::lane() / width * width + (from & (width - 1)), "__shfl_sync", line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, int line = __builtin_LINE()) {
  const int me = emulator::lane(), from = me ^ bits;
  return emulator::shuffle(mask, v, from / width > me / width ? me : from, "__shfl_xor_sync", line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, int line = __builtin_LINE()) {
  const int me = emulator::lane(), in = me % width;
  return emulator::shuffle(mask, v, in < int(by) ? me : me - int(by), "__shfl_up_sync", line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, int line = __builtin_LINE()) {
  const int me = emulator::lane(), in = me % width;
  return emulator::shuffle(mask, v, in + int(by) >= width ? me : me + int(by), "__shfl_down_sync", line);
}
inline unsigned __ballot_sync(unsigned mask, int p, int line = __builtin_LINE()) {
  const uint64_t* values = emulator::exchange(mask, p != 0, "__ballot_sync", line);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= unsigned((mask >> i & 1) && values[i]) << i;
  return bits;
}
inline int __any_sync(unsigned mask, int p, int line = __builtin_LINE()) { return __ballot_sync(mask, p, line) != 0; }
inline int __all_sync(unsigned mask, int p, int line = __builtin_LINE()) { return __ballot_sync(mask, p, line) == mask; }
template <class T>
unsigned __match_any_sync(unsigned mask, T v, int line = __builtin_LINE()) {
  const uint64_t* values = emulator::exchange(mask, emulator::pack(v), "__match_any_sync", line);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= unsigned((mask >> i & 1) && values[i] == emulator::pack(v)) << i;
  return bits;
}
#define KD_REDUCE(name, T, expression)                                                                        \
  inline T name(unsigned mask, T v, int line = __builtin_LINE()) {                                            \
    return emulator::reduce(mask, v, #name, line, [](T a, T b) { return T(expression); });                    \
  }
KD_REDUCE(__reduce_add_sync, unsigned, a + b)
KD_REDUCE(__reduce_add_sync, int, a + b)
KD_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
KD_REDUCE(__reduce_max_sync, int, a > b ? a : b)
KD_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
KD_REDUCE(__reduce_min_sync, int, a < b ? a : b)
KD_REDUCE(__reduce_or_sync, unsigned, a | b)
KD_REDUCE(__reduce_and_sync, unsigned, a & b)
KD_REDUCE(__reduce_xor_sync, unsigned, a ^ b)

// ---------------------------------------------------------------- intrinsics of one thread. Of the atomics: integers only.
template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
T atomicAdd(T* at, T by) { return std::exchange(*at, T(*at + by)); }
template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
T atomicMax(T* at, T v) { return std::exchange(*at, std::max(*at, v)); }
template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
T atomicMin(T* at, T v) { return std::exchange(*at, std::min(*at, v)); }
template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
T atomicOr(T* at, T v) { return std::exchange(*at, T(*at | v)); }
template <class T>
T __ldg(const T* at) { return *at; }
template <class T>
T __ldcs(const T* at) { return *at; }
template <class T>
T __ldcg(const T* at) { return *at; }
template <class T>
void __stcs(T* at, T v) { *at = v; }
template <class T>
void __stcg(T* at, T v) { *at = v; }

template <class A, class B>
constexpr auto min(A a, B b) -> std::common_type_t<A, B> { return b < a ? b : a; }
template <class A, class B>
constexpr auto max(A a, B b) -> std::common_type_t<A, B> { return a < b ? b : a; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline int __float_as_int(float v) { return emulator::unpack<int>(emulator::pack(v)); }
inline unsigned __float_as_uint(float v) { return emulator::unpack<unsigned>(emulator::pack(v)); }
inline float __int_as_float(int v) { return emulator::unpack<float>(emulator::pack(v)); }
inline float __uint_as_float(unsigned v) { return emulator::unpack<float>(emulator::pack(v)); }
inline long long __double_as_longlong(double v) { return emulator::unpack<long long>(emulator::pack(v)); }
inline double __longlong_as_double(long long v) { return emulator::unpack<double>(emulator::pack(v)); }
inline float rsqrtf(float v) { return 1 / std::sqrt(v); }
#define __expf expf  // macros: glibc has functions of these names
#define __exp10f exp10f
#define __logf logf
#define __log2f log2f
#define __powf powf
inline float __fdividef(float a, float b) { return a / b; }

// ---------------------------------------------------------------- runtime API
enum cudaError_t {
  cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719, cudaErrorCooperativeLaunchTooLarge = 720
};
using cudaStream_t = struct CUstream_st*;
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9, cudaFuncAttributeNonPortableClusterSizeAllowed = 15
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2, cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttributeValue {
  struct { unsigned x, y, z; } clusterDim;
  int cooperative;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulator {
inline std::map<const void*, std::size_t> allowed_shared;  // what cudaFuncSetAttribute gave each kernel beyond 48 KB
inline thread_local cudaError_t last_error = cudaSuccess;
inline cudaError_t answer(cudaError_t code, const std::string& why = "") {
  failure = why;
  return last_error = code;
}
inline cudaError_t launch(const Grid& grid, const void* kernel) {
  ++launches;
  const int64_t blocks = int64_t(grid.blocks.x) * grid.blocks.y * grid.blocks.z;
  const auto known = allowed_shared.find(kernel);
  if (blocks == 0 || grid.count() == 0 || grid.count() > kMaxThreads || grid.blocks.y > 65535 || grid.blocks.z > 65535) {
    return answer(cudaErrorInvalidConfiguration, "invalid number of blocks or threads");
  }
  if (grid.cluster > kMaxCluster || blocks % grid.cluster) return answer(cudaErrorInvalidConfiguration, "invalid cluster size");
  if (grid.shared > (known == allowed_shared.end() ? kDefaultShared : known->second)) {
    return answer(cudaErrorInvalidValue, "more dynamic shared memory than the kernel was allowed");
  }
  if (grid.cooperative && blocks > multiprocessors * blocks_per_multiprocessor) {
    return answer(cudaErrorCooperativeLaunchTooLarge, "more blocks than can be resident at once");
  }
  const std::string why = run(grid);
  return answer(why.empty() ? cudaSuccess : cudaErrorLaunchFailure, why);
}
}  // namespace emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  emulator::Grid grid;
  grid.blocks = config->gridDim;
  grid.threads = config->blockDim;
  grid.shared = config->dynamicSmemBytes;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    if (a.id == cudaLaunchAttributeCooperative) grid.cooperative = a.val.cooperative != 0;
    if (a.id == cudaLaunchAttributeClusterDimension) grid.cluster = int(a.val.clusterDim.x * a.val.clusterDim.y * a.val.clusterDim.z);
  }
  const std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  grid.body = [kernel, values] { std::apply(kernel, values); };
  return emulator::launch(grid, reinterpret_cast<const void*>(kernel));
}
template <class F>
cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return emulator::answer(cudaSuccess);
  if (value > int(emulator::max_shared)) return emulator::answer(cudaErrorInvalidValue, "more shared memory than a block can have");
  emulator::allowed_shared[reinterpret_cast<const void*>(kernel)] = std::size_t(value);
  return emulator::answer(cudaSuccess);
}
template <class F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F*, int, std::size_t) {
  *blocks = emulator::blocks_per_multiprocessor;
  return cudaSuccess;
}
template <class F>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, F*, const cudaLaunchConfig_t* config) {
  *clusters = config->attrs[0].val.clusterDim.x <= unsigned(emulator::kMaxCluster);
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount        ? emulator::multiprocessors
           : attribute == cudaDevAttrComputeCapabilityMajor   ? 9
           : attribute == cudaDevAttrComputeCapabilityMinor   ? 0
                                                              : int(emulator::max_shared);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }
inline cudaError_t cudaPeekAtLastError() { return emulator::last_error; }
inline const char* cudaGetErrorName(cudaError_t code) { return code == cudaSuccess ? "cudaSuccess" : "cudaError"; }
inline const char* cudaGetErrorString(cudaError_t code) {
  static thread_local std::string text;
  text = code == cudaSuccess ? "no error" : emulator::failure;
  return text.c_str();
}
inline cudaError_t cudaMemsetAsync(void* at, int value, std::size_t bytes, cudaStream_t) { return std::memset(at, value, bytes), cudaSuccess; }

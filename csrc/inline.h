// How a function is marked that every backend compiles into its callers: on a CPU, and in the device code of a GPU.
#pragma once

#if defined(__CUDACC__)
#define KD_INLINE static __device__ __forceinline__
#else
#define KD_INLINE static inline __attribute__((always_inline))
#endif

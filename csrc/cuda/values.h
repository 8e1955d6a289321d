// One number of a tensor whose dtype is known at run time: small tensors, where a kernel per dtype would buy nothing.
#pragma once

#include "cuda/packs.h"

namespace kdfast {
namespace cuda {

__device__ __forceinline__ float load_value(const void* data, Dtype dtype, int64_t at) {
  if (dtype == Dtype::f32) return static_cast<const float*>(data)[at];
  if (dtype == Dtype::bf16) return to_float(static_cast<const __nv_bfloat16*>(data)[at]);
  return to_float(static_cast<const __half*>(data)[at]);
}

__device__ __forceinline__ void store_value(void* data, Dtype dtype, int64_t at, float value) {
  if (dtype == Dtype::f32) {
    static_cast<float*>(data)[at] = value;
  } else if (dtype == Dtype::bf16) {
    static_cast<__nv_bfloat16*>(data)[at] = from_float<__nv_bfloat16>(value);
  } else {
    static_cast<__half*>(data)[at] = from_float<__half>(value);
  }
}

}  // namespace cuda
}  // namespace kdfast

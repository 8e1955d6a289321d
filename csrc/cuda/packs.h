// Logits four at a time: one access where rows are aligned to that, four where they are not or where the row ends.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "logits.h"

namespace kdfast {
namespace cuda {

constexpr int kPack = 4;  // eight 16-bit ones would spill

template <class T>
struct alignas(kPack * sizeof(T)) Pack {
  T v[kPack];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T>*>(from);
}
template <class T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T>& pack) {
  *reinterpret_cast<Pack<T>*>(to) = pack;
}

// The pack at `from`, of which `left` elements exist; -inf, a class that counts nothing, stands for the others.
template <class T>
__device__ __forceinline__ Pack<T> load_logits(const T* from, int left, bool wide) {
  if (wide) return load_pack(from);
  Pack<T> pack;
#pragma unroll
  for (int k = 0; k < kPack; ++k) pack.v[k] = k < left ? from[k] : from_float<T>(-__builtin_huge_valf());
  return pack;
}

template <class T>
__device__ __forceinline__ void store_as(void* data, int64_t at, const float (&values)[kPack], int left, bool wide) {
  T* to = static_cast<T*>(data) + at;
  Pack<T> pack;
#pragma unroll
  for (int k = 0; k < kPack; ++k) pack.v[k] = from_float<T>(values[k]);
  if (wide) return store_pack(to, pack);
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    if (k < left) to[k] = pack.v[k];
  }
}
// To element `at` of an operand whose dtype is T's or f32.
template <class T>
__device__ __forceinline__ void store_values(const Logits& operand, int64_t at, const float (&values)[kPack], int left, bool wide) {
  operand.dtype == Dtype::f32 ? store_as<float>(operand.data, at, values, left, wide) : store_as<T>(operand.data, at, values, left, wide);
}

// logits.h's row_offset, for device code. 64-bit: rows x classes passes 2^31 in real use.
__device__ __forceinline__ int64_t row_start(const Rows& rows, const Logits& operand, int64_t row) {
  int64_t offset = 0;
  for (int axis = rows.axes - 1; axis > 0; --axis) {
    offset += (row % rows.sizes[axis]) * operand.row_strides[axis];
    row /= rows.sizes[axis];
  }
  return offset + row * operand.row_strides[0];
}

// Whether every row of the operand begins at a whole pack; an absent one does.
inline bool rows_aligned(const Rows& rows, const Logits& operand) {
  if (!operand.data) return true;
  const int bytes = kPack * kItemSize[int(operand.dtype)];
  bool aligned = reinterpret_cast<std::uintptr_t>(operand.data) % bytes == 0;
  for (int axis = 0; axis < rows.axes; ++axis) {
    aligned &= rows.sizes[axis] == 1 || operand.row_strides[axis] * kItemSize[int(operand.dtype)] % bytes == 0;
  }
  return aligned;
}

}  // namespace cuda
}  // namespace kdfast

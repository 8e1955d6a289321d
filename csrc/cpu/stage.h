// Staging: a stretch of one row (or a tile of rows x classes) of any storage type and stride, in a small buffer of the
// compute type that stays in L1. Kernels see only padded, contiguous, aligned blocks: no tails, no types, no strides.
#pragma once

#include "cpu/vec.h"
#include "logits.h"

namespace kdfast {
namespace KD_ISA {

// n elements from a typed address into out[0, n), converted.
template <class T, class S>
KD_INLINE void load_range(const S* in, int64_t stride, int64_t n, T* out) {
  int64_t i = 0;
  if (stride == 1) {
    if constexpr (sizeof(T) == 4 || sizeof(S) == 8) {
      for (; i + kWidth<T> <= n; i += kWidth<T>) store(out + i, load_as(in + i));
    }
    for (; i < n; ++i) out[i] = T(load_one(in + i));
  } else {
    for (; i < n; ++i) out[i] = T(load_one(in + i * stride));
  }
}

template <class T, class S>
KD_INLINE void store_range(const T* in, int64_t n, S* out, int64_t stride) {
  int64_t i = 0;
  if (stride == 1) {
    if constexpr (sizeof(T) == 4 || sizeof(S) == 8) {
      for (; i + kWidth<T> <= n; i += kWidth<T>) store_as(out + i, load(in + i));
    }
    for (; i < n; ++i) store_one(out + i, in[i]);
  } else {
    for (; i < n; ++i) store_one(out + i * stride, in[i]);
  }
}

// The same by dtype code; float never meets a double (compute type double whenever an input is).
template <class T>
static inline void load_logits(const Logits& logits, int64_t offset, int64_t stride, int64_t n, T* out) {
  switch (logits.dtype) {
    case Dtype::f32: return load_range(static_cast<const float*>(logits.data) + offset, stride, n, out);
    case Dtype::bf16: return load_range(static_cast<const BFloat16*>(logits.data) + offset, stride, n, out);
    case Dtype::f16: return load_range(static_cast<const Half*>(logits.data) + offset, stride, n, out);
    case Dtype::f64:
      if constexpr (sizeof(T) == 8) return load_range(static_cast<const double*>(logits.data) + offset, stride, n, out);
  }
}

template <class T>
static inline void store_logits(const T* in, int64_t n, const Logits& logits, int64_t offset, int64_t stride) {
  switch (logits.dtype) {
    case Dtype::f32: return store_range(in, n, static_cast<float*>(logits.data) + offset, stride);
    case Dtype::bf16: return store_range(in, n, static_cast<BFloat16*>(logits.data) + offset, stride);
    case Dtype::f16: return store_range(in, n, static_cast<Half*>(logits.data) + offset, stride);
    case Dtype::f64:
      if constexpr (sizeof(T) == 8) return store_range(in, n, static_cast<double*>(logits.data) + offset, stride);
  }
}

// store_logits past the caches, where type, stride and alignment allow it: for outputs larger than any cache, whose lines
// would otherwise be read before they are written. End with stream_fence before another thread may read.
template <class T>
static inline void stream_logits(const T* in, int64_t n, const Logits& logits, int64_t offset, int64_t stride) {
  constexpr int W = kWidth<T>;
  T* out = static_cast<T*>(logits.data) + offset;
  const bool native = logits.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32);
  if (native && stride == 1 && n % W == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(Vec<T>) == 0) {
    for (int64_t i = 0; i < n; i += W) stream<T>(out + i, load(in + i));
    return;
  }
  store_logits(in, n, logits, offset, stride);
}

template <class T>
static inline void store_zeros(int64_t n, const Logits& logits, int64_t offset, int64_t stride) {
  const int64_t size = kItemSize[int(logits.dtype)];
  char* base = static_cast<char*>(logits.data) + offset * size;
  if (stride == 1) {
    std::memset(base, 0, std::size_t(n * size));
  } else {
    for (int64_t i = 0; i < n; ++i) std::memset(base + i * stride * size, 0, std::size_t(size));
  }
}

}  // namespace KD_ISA
}  // namespace kdfast

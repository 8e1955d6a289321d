// Tiles of the lanes driver: rows of any type and stride, a row in each column, and back.
#pragma once

#include <utility>

#include "cpu/stage.h"

namespace kdfast {
namespace KD_ISA {
namespace {

// W vectors of W lanes, lane j of vector i to lane i of vector j: rounds that exchange halves, quarters, ... single lanes.
template <class T, int by, int... lane>
KD_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, lane...>) {
  const Vec<T> first = __builtin_shufflevector(a, b, (lane & by ? kWidth<T> + lane - by : lane)...);
  b = __builtin_shufflevector(a, b, (lane & by ? kWidth<T> + lane : lane + by)...);
  a = first;
}
template <class T, int by = kWidth<T> / 2>
KD_INLINE void transpose(Vec<T> (&v)[kWidth<T>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth<T>; ++i) {
    if (!(i & by)) exchange<T, by>(v[i], v[i + by], std::make_integer_sequence<int, kWidth<T>>());
  }
  if constexpr (by > 1) transpose<T, by / 2>(v);
}

// Rows of n >= W contiguous values, `stride` apart, to and from a tile [n][pitch] with a row in each column, W x W at a time. The last
// values of a row are moved with those before them, some of which are then moved twice. Columns past `rows` hold anything.
template <class T, class S>
KD_INLINE void load_rows(const S* in, int64_t stride, int64_t rows, int64_t n, T* tile, int64_t pitch) {
  constexpr int W = kWidth<T>;
  for (int64_t row = 0; row < rows; row += W) {
    for (int64_t start = 0; start < n; start += W) {
      const int64_t from = start + W <= n ? start : n - W;
      Vec<T> v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = load_as(in + (row + i < rows ? row + i : rows - 1) * stride + from);
      transpose<T>(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(tile + (from + i) * pitch + row, v[i]);
    }
  }
}
template <class T, class S>
KD_INLINE void store_rows(const T* tile, int64_t pitch, int64_t rows, int64_t n, S* out, int64_t stride) {
  constexpr int W = kWidth<T>;
  for (int64_t row = 0; row < rows; row += W) {
    for (int64_t start = 0; start < n; start += W) {
      const int64_t from = start + W <= n ? start : n - W;
      Vec<T> v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = load(tile + (from + i) * pitch + row);
      transpose<T>(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        if (row + i < rows) store_as(out + (row + i) * stride + from, v[i]);
      }
    }
  }
}

// A tile [classes][pitch] of `rows` rows that lie `stride` apart, whatever their type and the classes' stride.
template <class T>
static void gather_tile(const Logits& logits, int64_t offset, int64_t stride, int64_t rows, int64_t classes, T* tile, int64_t pitch) {
  if (logits.class_stride == 1 && classes >= kWidth<T>) {
    if constexpr (sizeof(T) == 8) {
      if (logits.dtype == Dtype::f64) return load_rows(static_cast<const double*>(logits.data) + offset, stride, rows, classes, tile, pitch);
    } else {
      switch (logits.dtype) {
        case Dtype::f32: return load_rows(static_cast<const float*>(logits.data) + offset, stride, rows, classes, tile, pitch);
        case Dtype::bf16: return load_rows(static_cast<const BFloat16*>(logits.data) + offset, stride, rows, classes, tile, pitch);
        case Dtype::f16: return load_rows(static_cast<const Half*>(logits.data) + offset, stride, rows, classes, tile, pitch);
        case Dtype::f64: return;
      }
    }
  }
  for (int64_t c = 0; c < classes; ++c) load_logits(logits, offset + c * logits.class_stride, stride, rows, tile + c * pitch);
}
template <class T>
static void scatter_tile(const T* tile, int64_t pitch, int64_t rows, int64_t classes, const Logits& logits, int64_t offset, int64_t stride) {
  if (logits.class_stride == 1 && classes >= kWidth<T>) {
    if constexpr (sizeof(T) == 8) {
      if (logits.dtype == Dtype::f64) return store_rows(tile, pitch, rows, classes, static_cast<double*>(logits.data) + offset, stride);
    } else {
      switch (logits.dtype) {
        case Dtype::f32: return store_rows(tile, pitch, rows, classes, static_cast<float*>(logits.data) + offset, stride);
        case Dtype::bf16: return store_rows(tile, pitch, rows, classes, static_cast<BFloat16*>(logits.data) + offset, stride);
        case Dtype::f16: return store_rows(tile, pitch, rows, classes, static_cast<Half*>(logits.data) + offset, stride);
        case Dtype::f64: return;
      }
    }
  }
  for (int64_t c = 0; c < classes; ++c) store_logits(tile + c * pitch, rows, logits, offset + c * logits.class_stride, stride);
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kdfast

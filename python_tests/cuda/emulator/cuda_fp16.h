// Stands in for CUDA's header of this name: storage and conversions, round to nearest even, subnormals kept.
#pragma once

#include "cuda_runtime.h"

struct __half {
  unsigned short x;
};
struct __align__(4) __half2 {
  __half x, y;
};
using half = __half;
inline float __half2float(__half v) {
  const unsigned sign = unsigned(v.x & 0x8000) << 16, exponent = v.x >> 10 & 31, fraction = v.x & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(fraction) * 0x1p-24f;
  return __uint_as_float(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13);
}
inline __half __float2half_rn(float v) {
  const unsigned short sign = __float_as_uint(v) >> 16 & 0x8000;
  const float size = std::fabs(v);
  if (v != v) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<unsigned short>(sign | 0x7c00)};
  if (size < 0x1p-14f) return {static_cast<unsigned short>(sign | unsigned(std::nearbyint(size * 0x1p24f)))};
  const unsigned bits = __float_as_uint(size) - (112u << 23);
  return {static_cast<unsigned short>(sign | (bits + 0xfffu + (bits >> 13 & 1)) >> 13)};
}
inline __half __float2half(float v) { return __float2half_rn(v); }
inline __half __ushort_as_half(unsigned short v) { return {v}; }
inline unsigned short __half_as_ushort(__half v) { return v.x; }

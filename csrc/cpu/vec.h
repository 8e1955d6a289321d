// SIMD vectors of float or double in GCC/Clang vector extensions: one source, as wide as the instruction set of this object.
// Arithmetic and comparisons are the built-in operators; `mask ? a : b` selects per lane.
//
// Everything here is static or inside namespace KD_ISA: a weak symbol would let the linker keep one instruction set's copy
// for all of them. For the same reason kernel files use nothing of the standard library that could become a function.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define KD_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define KD_VECTOR_BYTES 32
#else
#define KD_VECTOR_BYTES 16
#endif

#include "inline.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are only passed to functions that are always inlined

namespace kdfast {
namespace KD_ISA {

constexpr float kInf = __builtin_inff();

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(KD_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(KD_VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(KD_VECTOR_BYTES)));
  typedef uint16_t B __attribute__((vector_size(KD_VECTOR_BYTES / 2)));  // storage of as many 16-bit floats
  static constexpr int W = KD_VECTOR_BYTES / 4;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(KD_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(KD_VECTOR_BYTES)));
  typedef uint64_t U __attribute__((vector_size(KD_VECTOR_BYTES)));
  static constexpr int W = KD_VECTOR_BYTES / 8;
};

template <class T>
using Vec = typename Simd<T>::V;
template <class T>
using IVec = typename Simd<T>::I;
template <class T>
constexpr int kWidth = Simd<T>::W;

template <class T>
KD_INLINE Vec<T> splat(T value) {
  return Vec<T>{} + value;
}

template <class T>
KD_INLINE Vec<T> load(const T* address) {
  Vec<T> v;
  std::memcpy(&v, address, sizeof v);
  return v;
}

template <class T>
KD_INLINE void store(T* address, Vec<T> v) {
  std::memcpy(address, &v, sizeof v);
}

// A store past the caches, for outputs far larger than them: the line is not read first. `address` is vector-aligned, and
// stream_fence orders the stores before the thread hands its work over.
template <class T>
KD_INLINE void stream(T* address, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(address), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(address), (__m256i)v);
#else
  store(address, v);
#endif
}
KD_INLINE void stream_fence() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class T>
KD_INLINE IVec<T> bits_of(Vec<T> v) {
  IVec<T> i;
  std::memcpy(&i, &v, sizeof i);
  return i;
}

template <class T>
KD_INLINE Vec<T> from_bits(IVec<T> i) {
  Vec<T> v;
  std::memcpy(&v, &i, sizeof v);
  return v;
}

// NaN in b is kept out: callers find NaN through the exponentials, which keep it.
template <class V>
KD_INLINE V vmax(V a, V b) {
  return b > a ? b : a;
}
template <class V>
KD_INLINE V vmin(V a, V b) {
  return b < a ? b : a;
}
// The sign bit in every lane. (Not the bits of splat(-0.0): 0 + -0.0 is +0.)
template <class T>
KD_INLINE IVec<T> sign_bits() {
  return (IVec<T>{} + 1) << (8 * int(sizeof(T)) - 1);
}
template <class T>
KD_INLINE Vec<T> vabs(Vec<T> v) {
  return from_bits<T>(bits_of<T>(v) & ~sign_bits<T>());
}

// Sum and greatest of the lanes by halving: log2(lanes) shuffles, where lane after lane would take as long as a short row.
template <class V>
KD_INLINE V rotate(V v, int by) {
  constexpr int n = int(sizeof(V) / sizeof(v[0]));
  if constexpr (n == 16) {
    return by == 8   ? __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
           : by == 4 ? __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
           : by == 2 ? __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
                     : __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  } else if constexpr (n == 8) {
    return by == 4   ? __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3)
           : by == 2 ? __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5)
                     : __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
  } else if constexpr (n == 4) {
    return by == 2 ? __builtin_shufflevector(v, v, 2, 3, 0, 1) : __builtin_shufflevector(v, v, 1, 0, 3, 2);
  } else {
    return __builtin_shufflevector(v, v, 1, 0);
  }
}
template <class V>
KD_INLINE auto greatest_lane(V v) {
  constexpr int n = int(sizeof(V) / sizeof(v[0]));
  if constexpr (n >= 16) v = vmax(v, rotate(v, 8));
  if constexpr (n >= 8) v = vmax(v, rotate(v, 4));
  if constexpr (n >= 4) v = vmax(v, rotate(v, 2));
  v = vmax(v, rotate(v, 1));
  return v[0];
}
template <class V>
KD_INLINE auto add_lanes(V v) {
  constexpr int n = int(sizeof(V) / sizeof(v[0]));
  if constexpr (n >= 16) v += rotate(v, 8);
  if constexpr (n >= 8) v += rotate(v, 4);
  if constexpr (n >= 4) v += rotate(v, 2);
  v += rotate(v, 1);
  return v[0];
}
template <class T>
KD_INLINE T sum_lanes(Vec<T> v) {
  return add_lanes(v);
}
template <class T>
KD_INLINE T max_lanes(Vec<T> v) {
  return greatest_lane(v);
}
KD_INLINE double sum_lanes_double_(Vec<double> v) { return add_lanes(v); }
KD_INLINE double sum_lanes_double_(Vec<float> v) {
  typedef float Part __attribute__((vector_size(KD_VECTOR_BYTES / 2)));
  Part low, high;
  std::memcpy(&low, &v, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
  return add_lanes(__builtin_convertvector(low, Vec<double>) + __builtin_convertvector(high, Vec<double>));
}
template <class T>
KD_INLINE double sum_lanes_double(Vec<T> v) {
  return sum_lanes_double_(v);
}

// ---------------------------------------------------------------- exp, log
// Constants per type. exp: round to n ln 2 + r, polynomial in r, scale by 2^n. log: m 2^k with m in [sqrt 1/2, sqrt 2).
template <class T>
struct Math;

template <>
struct Math<float> {
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  static constexpr float log2e = 1.44269504088896341f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float exp_min = -87.33654f, exp_max = 88.37626f;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr int32_t sqrt_half = 0x3f3504f3;
};

template <>
struct Math<double> {
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double log2e = 1.44269504088896340736, ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double exp_min = -708.396, exp_max = 709.43;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr int64_t sqrt_half = 0x3fe6a09e667f3bcd;
};

// sum of x^k / (k + first)!, k = 0..degree
template <class T, int degree>
KD_INLINE Vec<T> factorial_series(Vec<T> x, int first) {
  T coefficient[degree + 1];
  double factorial = 1;
  for (int k = 2; k <= first; ++k) factorial *= k;
  for (int k = 0; k <= degree; ++k) {
    coefficient[k] = T(1.0 / factorial);
    factorial *= first + k + 1;
  }
  Vec<T> sum = splat<T>(coefficient[degree]);
  for (int k = degree - 1; k >= 0; --k) sum = sum * x + coefficient[k];
  return sum;
}

KD_INLINE Vec<float> exp_polynomial(Vec<float> r) {  // minimax on |r| <= ln2 / 2 with the first two terms fixed: 3e-9
  Vec<float> p = splat(1.3814320361e-3f);
  p = p * r + 8.3688510854e-3f;
  p = p * r + 4.1668401088e-2f;
  p = p * r + 1.6666519524e-1f;
  p = p * r + 4.9999993373e-1f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}
KD_INLINE Vec<double> exp_polynomial(Vec<double> r) { return factorial_series<double, 13>(r, 0); }

// exp(x) for x up to exp_max, at most 2 ULP; 0 below exp_min (no subnormals), NaN stays NaN. For arguments known to be at
// most about 0, as all log-probabilities are.
template <class T>
KD_INLINE Vec<T> vexp_bounded(Vec<T> x) {
  using M = Math<T>;
  const Vec<T> t = x * M::log2e + M::round;
  const Vec<T> n = t - M::round;
  const Vec<T> r = (x - n * M::ln2_high) - n * M::ln2_low;
  const IVec<T> exponent = (IVec<T>)(((typename Simd<T>::U)bits_of<T>(t) + M::bias) << M::mantissa);  // wraps for a NaN
  // a product and not an integer addition to the exponent: the latter would make a number of a NaN
  const Vec<T> y = exp_polynomial(r) * from_bits<T>(exponent);
  return x < M::exp_min ? splat<T>(0) : y;
}

// exp(x) for any x: infinity above exp_max.
template <class T>
KD_INLINE Vec<T> vexp(Vec<T> x) {
  return x > Math<T>::exp_max ? splat<T>(T(kInf)) : vexp_bounded<T>(x);
}

KD_INLINE Vec<float> log_polynomial(Vec<float> f) {  // log(1 + f) - f, f in [sqrt(1/2) - 1, sqrt(2) - 1], Cephes' coefficients
  const Vec<float> z = f * f;
  Vec<float> p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return p * f * z - 0.5f * z;
}
KD_INLINE Vec<double> log_polynomial(Vec<double> f) {  // log(1 + f) = 2 artanh(s), s = f / (2 + f): fdlibm's form
  const Vec<double> s = f / (f + 2.0), z = s * s;
  Vec<double> p = splat(1.479819860511658591e-01);
  p = p * z + 1.531383769920937332e-01;
  p = p * z + 1.818357216161805012e-01;
  p = p * z + 2.222219843214978396e-01;
  p = p * z + 2.857142874366239149e-01;
  p = p * z + 3.999999999940941908e-01;
  p = p * z + 6.666666666666735130e-01;
  const Vec<double> half = 0.5 * f * f;
  return s * (half + p * z) - half;
}

// log(x) for normal x > 0, at most 2 ULP. With offset y: log(1 + y) to full relative precision, where x = 1 + y rounded.
template <class T>
KD_INLINE Vec<T> log_core(Vec<T> x, Vec<T> y) {
  using M = Math<T>;
  constexpr auto to_half = (decltype(M::sqrt_half)(M::bias) << M::mantissa) - M::sqrt_half;  // bits of 1 less those of sqrt 1/2
  const IVec<T> i = (IVec<T>)((typename Simd<T>::U)bits_of<T>(x) + to_half);  // wraps for a NaN
  const IVec<T> k = (i >> M::mantissa) - M::bias;
  const IVec<T> m = (i & ((decltype(M::sqrt_half)(1) << M::mantissa) - 1)) + M::sqrt_half;
  // k = 0 means x in [sqrt 1/2, sqrt 2): there 1 + y was rounded, y itself was not
  const Vec<T> f = k == 0 ? y : from_bits<T>(m) - T(1);
  const Vec<T> n = __builtin_convertvector(k, Vec<T>);
  return n * M::ln2_high + (f + (n * M::ln2_low + log_polynomial(f)));
}

template <class T>
KD_INLINE Vec<T> vlog(Vec<T> x) {
  return log_core<T>(x, x - T(1));
}

// log(1 + y), y > -1, relative error of a few ULP also for tiny y.
template <class T>
KD_INLINE Vec<T> vlog1p(Vec<T> y) {
  return log_core<T>(y + T(1), y);
}

// exp(y) - 1 for |y| <= 1/2, relative error of a few ULP.
KD_INLINE Vec<float> expm1_small(Vec<float> y) { return y * factorial_series<float, 7>(y, 1); }
KD_INLINE Vec<double> expm1_small(Vec<double> y) { return y * factorial_series<double, 14>(y, 1); }

// ---------------------------------------------------------------- storage types
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

using Bits16 = Simd<float>::B;

KD_INLINE Vec<float> load_as(const float* p) { return load(p); }
KD_INLINE Vec<float> load_as(const BFloat16* p) {
  Bits16 raw;
  std::memcpy(&raw, p, sizeof raw);
  return from_bits<float>(__builtin_convertvector(raw, IVec<float>) << 16);
}

KD_INLINE void store_as(float* p, Vec<float> v) { store(p, v); }
KD_INLINE void store_as(BFloat16* p, Vec<float> v) {  // round to nearest even; NaN stays NaN (quiet)
  using U = Simd<float>::U;
  U u;
  std::memcpy(&u, &v, sizeof u);
  const U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const U nan = (u >> 16) | 0x40;
  const U chosen = v == v ? rounded : nan;
  const Bits16 raw = __builtin_convertvector(chosen, Bits16);
  std::memcpy(p, &raw, sizeof raw);
}

#if defined(__AVX512F__)
KD_INLINE Vec<float> load_as(const Half* p) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
KD_INLINE void store_as(Half* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
KD_INLINE Vec<float> load_as(const Half* p) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
KD_INLINE void store_as(Half* p, Vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
// Without a conversion instruction: integer arithmetic, one value at a time.
KD_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 0x1f, mantissa = h & 0x3ff;
  uint32_t u;
  if (exponent == 0x1f) {
    u = sign | 0x7f800000 | (mantissa << 13);
  } else if (exponent) {
    u = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {  // subnormal: mantissa * 2^-24, exact in float
    const float magnitude = float(mantissa) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
KD_INLINE uint16_t float_to_half(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return sign | 0x7e00;   // NaN
  if (u >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more: infinity
  if (u < 0x38800000) {                       // below 2^-14: a subnormal half; adding 1/2 lets the FPU round at 2^-24
    float magnitude;
    std::memcpy(&magnitude, &u, 4);
    magnitude += 0.5f;
    uint32_t shifted;
    std::memcpy(&shifted, &magnitude, 4);
    return uint16_t(sign | (shifted - 0x3f000000));
  }
  return uint16_t(sign | ((u + 0xc8000fff + ((u >> 13) & 1)) >> 13));
}
KD_INLINE Vec<float> load_as(const Half* p) {
  Vec<float> v;
  for (int i = 0; i < kWidth<float>; ++i) v[i] = half_to_float(p[i].bits);
  return v;
}
KD_INLINE void store_as(Half* p, Vec<float> v) {
  for (int i = 0; i < kWidth<float>; ++i) p[i].bits = float_to_half(v[i]);
}
#endif

// double is computed in double; the narrower types can meet a double on the other side (student float, teacher double).
KD_INLINE Vec<double> load_as(const double* p) { return load(p); }
KD_INLINE void store_as(double* p, Vec<double> v) { store(p, v); }

// One value, any storage type.
KD_INLINE float load_one(const float* p) { return *p; }
KD_INLINE double load_one(const double* p) { return *p; }
KD_INLINE float load_one(const BFloat16* p) {
  const uint32_t u = uint32_t(p->bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
#if defined(__F16C__) || defined(__AVX512F__)
KD_INLINE float load_one(const Half* p) { return _cvtsh_ss(p->bits); }
KD_INLINE void store_one(Half* p, float v) { p->bits = _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
KD_INLINE float load_one(const Half* p) { return half_to_float(p->bits); }
KD_INLINE void store_one(Half* p, float v) { p->bits = float_to_half(v); }
#endif
KD_INLINE void store_one(float* p, float v) { *p = v; }
KD_INLINE void store_one(double* p, double v) { *p = v; }
KD_INLINE void store_one(BFloat16* p, float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  p->bits = uint16_t(v == v ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : (u >> 16) | 0x40);
}

}  // namespace KD_ISA
}  // namespace kdfast

// What the two drivers of the divergences share: the number type of divergence_terms.h, and sizes.
#pragma once

#include "cpu/divergence.h"
#include "cpu/stage.h"
#include "memory.h"

namespace kdfast {
namespace KD_ISA {
namespace {


// The number type of divergence_terms.h here: a vector.
template <class T>
struct VectorOps {
  using N = Vec<T>;
  KD_INLINE N set(double value) { return splat<T>(T(value)); }
  template <class M>
  KD_INLINE N select(M mask, N a, N b) {
    return mask ? a : b;
  }
  KD_INLINE auto equal(N a, N b) { return a == b; }
  KD_INLINE N abs(N a) { return vabs<T>(a); }
  KD_INLINE N min(N a, N b) { return vmin(a, b); }
  KD_INLINE N max(N a, N b) { return vmax(a, b); }
  KD_INLINE N exp(N a) { return vexp_bounded<T>(a); }  // of a log-probability
  KD_INLINE N exp_any(N a) { return vexp<T>(a); }
  KD_INLINE N log1p(N a) { return vlog1p<T>(a); }
  KD_INLINE N expm1_small(N a) { return kdfast::KD_ISA::expm1_small(a); }
  // sum x^k / (k + 2)! for |x| <= 1/4
  KD_INLINE N phi_series(N x) { return factorial_series<T, sizeof(T) == 4 ? 5 : 11>(x, 2); }
  KD_INLINE N polynomial(N x, const double* coefficients) {
    constexpr int terms = sizeof(T) == 4 ? 8 : 16;
    N sum = set(coefficients[terms - 1]);
    for (int i = terms - 2; i >= 0; --i) sum = sum * x + T(coefficients[i]);
    return sum;
  }
};

constexpr int kKeptBlocks = 192;  // blocks whose exponentials may be kept: up to 196608 classes
constexpr int kBlock = 1024;  // classes staged at a time: 4 KB (float) per buffer, all buffers fit L1

template <class T>
struct Stats {
  T max_x = 0, log_x = 0, max_z = 0, log_z = 0, gap = 0, sum_v = 0, sum_u = 0;  // see kStats
};

// d = (z - x) / T - gap is exact where the models' logits lie together, as z - x is; where they lie apart, that difference
// itself would be rounded at the size of the distance, so each side is first taken relative to its largest logit.
constexpr double kFar = 32;
template <class T>
KD_INLINE bool far_apart(T max_x, T max_z) {
  return max_z - max_x > T(kFar) || max_x - max_z > T(kFar);
}

// What a driver reads next, asked for a line at a time while it computes exponentials. Left to itself the processor fetches ahead
// only within a page of 4 KB, and every block of a row and every class of a map begins another page.
struct Ahead {
  uintptr_t from = 0, step = 0;  // address, and bytes for each value of this block (rows) or class of this tile (lanes); 0: nothing
};
KD_INLINE void fetch(Ahead ahead, int64_t i) {
  if (ahead.step) __builtin_prefetch(reinterpret_cast<const void*>(ahead.from + uintptr_t(i) * ahead.step));
}
KD_INLINE uintptr_t address_of(const Logits& logits, int64_t offset) {
  return reinterpret_cast<uintptr_t>(logits.data) + uintptr_t(offset) * uintptr_t(kItemSize[int(logits.dtype)]);
}
// The block of a row that begins at `offset`: the row's next one, or the first of the next row where rows are contiguous.
KD_INLINE Ahead behind(const Logits& logits, int64_t offset) {
  return logits.class_stride == 1 ? Ahead{address_of(logits, offset), uintptr_t(kItemSize[int(logits.dtype)])} : Ahead{};
}

// The tile that begins at `offset`: all its classes at one lane.
KD_INLINE Ahead beneath(const Logits& logits, int64_t beside, int64_t offset) {
  return beside == 1 ? Ahead{address_of(logits, offset), uintptr_t(logits.class_stride) * uintptr_t(kItemSize[int(logits.dtype)])} : Ahead{};
}

// A term of factor 0 is left out: 0 times the gradient of an infinite divergence is not 0.
template <class T>
KD_INLINE Vec<T> scaled(Vec<T> gradient, T factor) {
  return factor == T(0) ? splat<T>(0) : gradient * factor;
}
template <class T>
KD_INLINE Vec<T> scaled_lanes(Vec<T> gradient, Vec<T> factor) {
  return factor == T(0) ? splat<T>(0) : gradient * factor;
}

template <class T>
KD_INLINE T row_value(const void* values, int64_t row, T otherwise) {
  return values ? static_cast<const T*>(values)[row] : otherwise;
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kdfast

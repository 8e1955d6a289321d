// Rows driver of the divergences, first pass: blocks of a row where they lie or staged, and their log-sum-exps.
#pragma once

#include "cpu/divergence_common.h"

namespace kdfast {
namespace KD_ISA {
namespace {

template <class T>
struct Row {
  const DivergenceCall* call;
  int64_t index, s, t, gs, gt;  // row number and element offsets in the four operands
  T inverse_t;
  int64_t label;  // -1: none
};

template <class T>
KD_INLINE bool in_place(const Logits& logits, int n) {
  const bool native = logits.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32);
  return native && logits.class_stride == 1 && n % kWidth<T> == 0;
}

// A padded block [start, start + n) of one operand: in place where it can be, else staged in `buffer`. The class `hole`
// (dkd: the target) reads as -inf.
template <class T>
KD_INLINE const T* block_of(const Logits& logits, int64_t offset, int64_t start, int n, int64_t hole, T* buffer) {
  const bool inside = hole >= start && hole < start + n;
  if (in_place<T>(logits, n) && !inside) return static_cast<const T*>(logits.data) + offset + start;
  load_logits(logits, offset + start * logits.class_stride, logits.class_stride, n, buffer);
  for (int i = n; i % kWidth<T>; ++i) buffer[i] = -T(kInf);
  if (inside) buffer[hole - start] = -T(kInf);
  return buffer;
}

// Where a block of gradient is written: to its place, or to `buffer` and from there by flush.
template <class T>
KD_INLINE T* out_block(const Logits& logits, int64_t offset, int64_t start, int n, T* buffer) {
  return in_place<T>(logits, n) ? static_cast<T*>(logits.data) + offset + start : buffer;
}
// Whether a block of gradient goes past the caches: the whole is large, it is written in place, aligned, and no single class
// is corrected afterwards.
template <class T>
KD_INLINE bool may_stream(const DivergenceCall& call, const T* out, const T* buffer) {
  return call.stream && out != buffer && reinterpret_cast<uintptr_t>(out) % KD_VECTOR_BYTES == 0;
}
template <class T>
KD_INLINE void flush(const T* out, const T* buffer, int n, const Logits& logits, int64_t offset, int64_t start) {
  if (out == buffer) store_logits(buffer, n, logits, offset + start * logits.class_stride, logits.class_stride);
}

// Online log-sum-exp of x / T: running max of x and sum of exp((x - max) / T).
template <class T>
struct LogSum {
  T max = -T(kInf);
  double sum = 0, log = 0;  // log of the sum, once all is added

  // With `keep`, the exponentials are kept there (relative to the max after this call).
  KD_INLINE void add(LogSum& self, const T* x, int n, T inverse_t, T* keep = nullptr, Ahead ahead = {}) {
    constexpr int W = kWidth<T>;
    Vec<T> m0 = splat<T>(-T(kInf)), m1 = m0;
    int i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
      m0 = vmax(m0, load(x + i));
      m1 = vmax(m1, load(x + i + W));
    }
    if (i < n) m0 = vmax(m0, load(x + i));
    const T block = max_lanes<T>(vmax(m0, m1));
    if (block == -T(kInf)) {  // nothing but -inf; a NaN would hide here
      for (int j = 0; j < n; ++j) {
        if (x[j] != x[j]) self.sum = double(x[j]);
        if (keep) keep[j] = 0;
      }
      return;
    }
    if (block > self.max) {
      // exp(-inf) = 0 starts the sum; a double keeps the rescaling exact to the float result
      self.sum *= self.max == -T(kInf) ? 1.0 : double(vexp_bounded<T>(splat<T>((self.max - block) * inverse_t))[0]);
      self.max = block;
    }
    const Vec<T> m = splat<T>(self.max);
    Vec<T> s0 = splat<T>(0), s1 = s0;
    if (keep) {
      for (i = 0; i < n; i += W) {
        fetch(ahead, i);
        const Vec<T> e = vexp_bounded<T>((load(x + i) - m) * inverse_t);
        store(keep + i, e);
        s0 += e;
      }
    } else {
      for (i = 0; i + 2 * W <= n; i += 2 * W) {
        fetch(ahead, i);
        fetch(ahead, i + W);
        s0 += vexp_bounded<T>((load(x + i) - m) * inverse_t);
        s1 += vexp_bounded<T>((load(x + i + W) - m) * inverse_t);
      }
      if (i < n) s0 += vexp_bounded<T>((load(x + i) - m) * inverse_t);
    }
    self.sum += sum_lanes_double<T>(s0 + s1);
  }
  bool bad() const { return !(sum < double(kInf)) || max == T(kInf); }
  bool empty() const { return max == -T(kInf); }
  double value(T inverse_t) const { return double(max) * double(inverse_t) + log; }
};

// Exponentials of a row kept between the passes, where a row and these fit nine tenths of the second-level cache (beyond that
// they are no faster read back than computed): [classes] of each model, and per block the max they are relative to. After a
// sweep that keeps them: q and v.
template <class T>
struct Kept {
  T *first = nullptr, *second = nullptr;
  T max_first[kKeptBlocks], max_second[kKeptBlocks];
  double lse = 0, lse_z = 0;

  KD_INLINE void reserve(Kept& self, const DivergenceCall& call) {
    const int64_t padded = (call.classes + kBlock - 1) / kBlock * kBlock, blocks = padded / kBlock;
    const int64_t row = call.classes * (kItemSize[int(call.student.dtype)] + kItemSize[int(call.teacher.dtype)]);
    if (blocks > kKeptBlocks || 10 * (row + 2 * padded * int64_t(sizeof(T))) > 9 * second_level_cache()) return;
    self.first = static_cast<T*>(thread_scratch(0, std::size_t(padded) * sizeof(T)));
    self.second = static_cast<T*>(thread_scratch(1, std::size_t(padded) * sizeof(T)));
  }
};

template <class T>
struct LogSums {
  LogSum<T> student, teacher, raw;  // raw: student at T = 1, for cross-entropy
  double total = 0;                 // sum of the student's logits, for label smoothing
  bool has_raw = false;
};

template <class T>
static void log_sums(const Row<T>& row, int64_t hole, bool need_raw, bool need_total, LogSums<T>& out, Kept<T>& kept) {
  const DivergenceCall& call = *row.call;
  alignas(64) T buffer_x[kBlock], buffer_z[kBlock];
  out.has_raw = need_raw && row.inverse_t != T(1);
  for (int64_t start = 0; start < call.classes; start += kBlock) {
    const int n = int(call.classes - start < kBlock ? call.classes - start : kBlock);
    const int padded = (n + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
    const T* x = block_of(call.student, row.s, start, n, hole, buffer_x);
    const T* z = block_of(call.teacher, row.t, start, n, hole, buffer_z);
    LogSum<T>::add(out.student, x, padded, row.inverse_t, kept.first ? kept.first + start : nullptr, behind(call.student, row.s + start + n));
    LogSum<T>::add(out.teacher, z, padded, row.inverse_t, kept.second ? kept.second + start : nullptr, behind(call.teacher, row.t + start + n));
    if (kept.first) {
      kept.max_first[start / kBlock] = out.student.max;
      kept.max_second[start / kBlock] = out.teacher.max;
    }
    if (out.has_raw) LogSum<T>::add(out.raw, x, padded, T(1));
    if (need_total) {
      for (int i = 0; i < n; ++i) out.total += start + i == hole ? 0.0 : double(x[i]);
    }
  }
  out.student.log = __builtin_log(out.student.sum);
  out.teacher.log = __builtin_log(out.teacher.sum);
  if (out.has_raw) out.raw.log = __builtin_log(out.raw.sum);
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kdfast

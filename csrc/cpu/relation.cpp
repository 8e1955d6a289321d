// A thread owns whole rows. A row of both tables is a few KB to a few dozen KB, so its passes (largest score; exponentials
// and their sum; comparison; gradient) read main memory once, right behind the matrix product that wrote it.
#include "cpu/relation.h"

#include "cpu/vec.h"
#include "parallel.h"

namespace kdfast {
namespace KD_ISA {
namespace {

// The first W - 1 values of a vector may be what is left of a row: load_part fills the rest, store_part leaves it alone.
template <class T>
KD_INLINE Vec<T> load_part(const T* p, int64_t n, T fill) {
  Vec<T> v = splat(fill);
  std::memcpy(&v, p, sizeof(T) * std::size_t(n));
  return v;
}

// f(vector, how many of its lanes count) -> vector to store; `fill` in the lanes that do not count.
template <class T, class F>
KD_INLINE void transform(T* row, int64_t n, T fill, const F& f) {
  int64_t c = 0;
  for (; c + kWidth<T> <= n; c += kWidth<T>) store(row + c, f(load(row + c), c));
  if (c < n) {
    const Vec<T> v = f(load_part(row + c, n - c, fill), c);
    std::memcpy(row + c, &v, sizeof(T) * std::size_t(n - c));
  }
}

template <class T>
struct Softmax {
  T top, mass;
};

// row <- exp(row - max), the masked columns being -inf before. A row of only -inf becomes zeros with mass 1; NaN stays.
template <class T>
static Softmax<T> exponentials(T* row, int64_t n) {
  Vec<T> best = splat(-T(kInf));
  int64_t c = 0;
  for (; c + kWidth<T> <= n; c += kWidth<T>) best = vmax(best, load(row + c));
  if (c < n) best = vmax(best, load_part(row + c, n - c, -T(kInf)));
  const T top = max_lanes<T>(best);
  const T base = top == -T(kInf) ? T(0) : top;
  Vec<T> sum{};
  transform(row, n, -T(kInf), [&](Vec<T> v, int64_t) __attribute__((always_inline)) {
    const Vec<T> e = vexp<T>(v - base);
    sum += e;
    return e;
  });
  const T mass = sum_lanes<T>(sum);
  return {top, mass == 0 ? T(1) : mass};
}

template <class T>
KD_INLINE void scale_row(T* row, int64_t n, T scale) {
  transform(row, n, T(0), [&](Vec<T> v, int64_t) __attribute__((always_inline)) { return v * scale; });
}

template <class T>
static void leave_out(T* row, int64_t n, const uint8_t* mask, int64_t own, T fill) {
  if (mask) {
    for (int64_t c = 0; c < n; ++c)
      if (!mask[c]) row[c] = fill;
  }
  if (own >= 0) row[own] = fill;
}

template <class T>
static T compare_row(const RelationRows& call, T* s, T* t, T weight) {
  const int64_t n = call.columns;
  const bool softmax = call.compare == Compare::softmax;
  T p_factor = 1, q_factor = 1;
  if (softmax) {
    p_factor = 1 / exponentials(s, n).mass;
    q_factor = 1 / exponentials(t, n).mass;
  }
  Vec<T> squares{}, with_p{}, with_q{};
  auto pass = [&](Vec<T> p, Vec<T> q) __attribute__((always_inline)) {
    const Vec<T> e = p * p_factor - q * q_factor;
    squares += e * e;
    with_p += p * p_factor * e;
    with_q += q * q_factor * e;
  };
  int64_t c = 0;
  for (; c + kWidth<T> <= n; c += kWidth<T>) pass(load(s + c), load(t + c));
  if (c < n) pass(load_part(s + c, n - c, T(0)), load_part(t + c, n - c, T(0)));
  const T row = sum_lanes<T>(squares);
  if (!call.need_student && !call.need_teacher) return row;
  const T p_mean = softmax ? sum_lanes<T>(with_p) : T(0), q_mean = softmax ? sum_lanes<T>(with_q) : T(0);
  const T s_factor = 2 * weight * T(call.student_scale), t_factor = -2 * weight * T(call.teacher_scale);
  auto gradient = [&](T* ps, T* qs, int64_t count) __attribute__((always_inline)) {
    const bool whole = count == kWidth<T>;
    const Vec<T> p = (whole ? load(ps) : load_part(ps, count, T(0))) * p_factor, q = (whole ? load(qs) : load_part(qs, count, T(0))) * q_factor;
    const Vec<T> e = p - q;
    const Vec<T> gs = softmax ? p * (e - p_mean) * s_factor : e * s_factor, gt = softmax ? q * (e - q_mean) * t_factor : e * t_factor;
    if (call.need_student) std::memcpy(ps, &gs, sizeof(T) * std::size_t(count));
    if (call.need_teacher) std::memcpy(qs, &gt, sizeof(T) * std::size_t(count));
  };
  for (c = 0; c + kWidth<T> <= n; c += kWidth<T>) gradient(s + c, t + c, kWidth<T>);
  if (c < n) gradient(s + c, t + c, n - c);
  return row;
}

template <class T>
static void relation(const RelationRows& call) {
  const int64_t n = call.columns;
  const T fill = call.compare == Compare::softmax ? -T(kInf) : T(0);
  parallel_for(call.sets * call.rows, 1 + 8192 / n, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t set = index / call.rows, r = index % call.rows, own = call.diagonal ? -1 : call.first_row + r;
      T* s = static_cast<T*>(call.student) + index * n;
      T* t = static_cast<T*>(call.teacher) + index * n;
      const uint8_t* mask = call.mask ? call.mask + set * n : nullptr;
      scale_row(s, n, T(call.student_scale));
      scale_row(t, n, T(call.teacher_scale));
      leave_out(s, n, mask, own, fill);
      leave_out(t, n, mask, own, fill);
      const T weight = call.weight ? static_cast<const T*>(call.weight)[set * call.weight_stride + r] : T(0);
      const T row = compare_row(call, s, t, weight);
      static_cast<T*>(call.out)[set * call.out_stride + r] = mask && !mask[call.first_row + r] ? T(0) : row;
    }
  });
}

template <class T>
static void contrast(const ContrastRows& call) {
  const int64_t n = call.columns;
  const T scale = T(call.scale);
  parallel_for(call.rows, 1 + 8192 / n, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* row = static_cast<T*>(call.scores) + r * n;
      const int64_t positive = call.positive[r];
      scale_row(row, n, scale);
      const T at_positive = row[positive];
      const int64_t own = call.exclude_self && call.first_row + r < n ? call.first_row + r : -1;
      leave_out(row, n, static_cast<const uint8_t*>(nullptr), own, -T(kInf));
      if (call.grad_rows) {
        const T lse = static_cast<const T*>(call.lse)[r], factor = static_cast<const T*>(call.grad_rows)[r] * scale;
        transform(row, n, -T(kInf), [&](Vec<T> v, int64_t) __attribute__((always_inline)) { return vexp<T>(v - lse) * factor; });
        row[positive] -= factor;
        continue;
      }
      const Softmax<T> e = exponentials(row, n);
      const T lse = T(__builtin_log(double(e.mass))) + e.top;
      static_cast<T*>(call.lse)[r] = lse;
      static_cast<T*>(call.out)[r] = lse - at_positive;
      if (!call.unit_gradient) continue;
      scale_row(row, n, scale / e.mass);
      row[positive] -= scale;
    }
  });
}

}  // namespace

void relation_rows(const RelationRows& call) { call.f64 ? relation<double>(call) : relation<float>(call); }
void contrast_rows(const ContrastRows& call) { call.f64 ? contrast<double>(call) : contrast<float>(call); }

}  // namespace KD_ISA
}  // namespace kdfast

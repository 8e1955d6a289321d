// One transport problem and the passes over its kernel matrix K.
//
// K_ij = exp(-C_ij / epsilon + Fr_i + Gr_j), with reference potentials Fr, Gr. A half-step is then a product with K and a
// division, no exponential per entry:  sum_j exp(-C_ij / epsilon + G_j) = exp(-Fr_i) (K v)_i,  v = exp(G - Gr).
// Entries below the smallest normal number are lost; that is harmless while |log u|, |log v| stay below kDrift, since
// what is lost is then below exp(2 kDrift) times that number, against sums that matter of order one.
//
// Small problems (sinkhorn.h) hold K and its transpose, so both products add whole rows and no sum crosses lanes. Large
// ones hold K alone and read it once per iteration: the product with a row, the update of u_i, and the row's share of
// the column sums come together. Column sums are kept per block of rows and added in block order.
#pragma once

#include "cpu/sinkhorn.h"
#include "cpu/stage.h"
#include "memory.h"
#include "parallel.h"
#include "sinkhorn_terms.h"

namespace kdfast {
namespace KD_ISA {
namespace {

template <class T>
struct Limits;
template <>
struct Limits<float> {
  // K = exp(-C / epsilon) with zero references needs none of the entries to be lost, u K v to stay finite: 40 + 40 < 87.
  static constexpr float plain = 40, drift = 30, tiny = 1.17549435e-38f;
};
template <>
struct Limits<double> {
  static constexpr double plain = 300, drift = 150, tiny = 2.2250738585072014e-308;
};

constexpr int64_t kBlockRows = 64;  // rows of a parallel block of a large problem
constexpr int64_t kGroup = 16;      // rows whose dot products and column shares are taken together: still in L2 the second time
constexpr int64_t kStage = 1024;    // entries of a cost row staged at a time

// As many doubles as a vector has lanes.
template <class T>
struct WideOf {
  typedef double D __attribute__((vector_size(kWidth<T> * 8)));
};
template <class T>
using Wide = typename WideOf<T>::D;

template <class T>
KD_INLINE Wide<T> widen(Vec<T> v) {
  return __builtin_convertvector(v, Wide<T>);
}
template <class T>
KD_INLINE Vec<T> narrow(Wide<T> v) {
  return __builtin_convertvector(v, Vec<T>);
}
template <class T>
KD_INLINE Wide<T> load_wide(const double* address) {
  Wide<T> v;
  std::memcpy(&v, address, sizeof v);
  return v;
}
template <class T>
KD_INLINE void store_wide(double* address, Wide<T> v) {
  std::memcpy(address, &v, sizeof v);
}

// Hands out 64-byte aligned arrays of one buffer; with a null base it only counts.
struct Arena {
  char* base;
  std::size_t used = 0;
  template <class T>
  KD_INLINE T* take(Arena& arena, int64_t count) {
    T* address = reinterpret_cast<T*>(arena.base + arena.used);
    arena.used += (std::size_t(count) * sizeof(T) + 63) & ~std::size_t{63};
    return address;
  }
};

KD_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
template <class T>
KD_INLINE int64_t padded(int64_t n) {
  return (n + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}

template <class T>
struct Problem {
  const SinkhornCall* call;
  int64_t index;           // which of the batch
  int64_t n, m, np, mp;    // sizes, and padded to whole vectors; padding holds zeros (potentials: -inf)
  int64_t blocks;          // blocks of rows; 1 when small
  bool small;
  T *K, *KT;               // [n, mp]; [m, np] when small
  T *a, *b;                // weights, 0 where dead: weight 0, or nothing it may exchange mass with
  T *log_a, *log_b;
  T *Fr, *Gr;              // reference potentials of K
  T *u, *v;                // exp(F - Fr), exp(G - Gr)
  double *F, *G, *F_old, *G_old;
  T *s, *sums;             // [np], [mp] products with K
  T* partial;              // [blocks, mp] column sums
  double* row_values;      // [n]
};

template <class T>
KD_INLINE void take_problem(Arena& arena, const SinkhornCall& call, Problem<T>& p) {
  p.call = &call;
  p.n = call.n, p.m = call.m, p.np = padded<T>(call.n), p.mp = padded<T>(call.m);
  p.small = sinkhorn_small(call);
  p.blocks = p.small ? 1 : (p.n + kBlockRows - 1) / kBlockRows;
  p.K = Arena::take<T>(arena, p.n * p.mp);
  p.KT = p.small ? Arena::take<T>(arena, p.m * p.np) : nullptr;
  T** const rows[] = {&p.a, &p.log_a, &p.Fr, &p.u, &p.s};
  for (T** array : rows) *array = Arena::take<T>(arena, p.np);
  T** const columns[] = {&p.b, &p.log_b, &p.Gr, &p.v, &p.sums};
  for (T** array : columns) *array = Arena::take<T>(arena, p.mp);
  p.F = Arena::take<double>(arena, p.np), p.F_old = Arena::take<double>(arena, p.np);
  p.G = Arena::take<double>(arena, p.mp), p.G_old = Arena::take<double>(arena, p.mp);
  p.partial = Arena::take<T>(arena, p.blocks * p.mp);
  p.row_values = Arena::take<double>(arena, p.n);
}

template <class T>
KD_INLINE void fill(T* x, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) x[i] = value;
}

// body(block, first row, end row) for every block of rows.
template <class T, class F>
KD_INLINE void over_blocks(const Problem<T>& p, const F& body) {
  if (p.blocks == 1) return body(int64_t{0}, int64_t{0}, p.n);
  parallel_for(p.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) body(block, block * kBlockRows, at_most(p.n, (block + 1) * kBlockRows));
  });
}

// sums[j] = the blocks' column sums, in block order.
template <class T>
KD_INLINE void add_blocks(const Problem<T>& p, T* sums) {
  for (int64_t j = 0; j < p.mp; j += kWidth<T>) {
    Vec<T> total = load(p.partial + j);
    for (int64_t block = 1; block < p.blocks; ++block) total += load(p.partial + block * p.mp + j);
    store(sums + j, total);
  }
}

// A stretch [j, j + count) of cost row i, count <= kStage: in place if it is T, dense and whole vectors, else staged with
// `pad` behind it.
template <class T>
KD_INLINE const T* cost_row(const Problem<T>& p, int64_t i, int64_t j, int64_t count, T pad, T* buffer) {
  const Logits& cost = p.call->cost;
  const int64_t offset = row_offset(p.call->rows, cost, p.index * p.n + i) + j * cost.class_stride;
  const bool native = cost.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32);
  if (native && cost.class_stride == 1 && count % kWidth<T> == 0) return static_cast<const T*>(cost.data) + offset;
  load_logits(cost, offset, cost.class_stride, count, buffer);
  for (int64_t c = count; c % kWidth<T>; ++c) buffer[c] = pad;
  return buffer;
}

// body(j, pointer to the row from j on, padded count) over the row's stretches.
template <class T, class F>
KD_INLINE void over_row(const Problem<T>& p, int64_t i, T pad, const F& body) {
  alignas(64) T buffer[kStage];
  for (int64_t j = 0; j < p.m; j += kStage) {
    const int64_t count = at_most(kStage, p.m - j);
    body(j, cost_row(p, i, j, count, pad, buffer), padded<T>(count));
  }
}

template <class T>
KD_INLINE bool any_lane(IVec<T> mask) {
  int64_t any = 0;
  for (int i = 0; i < kWidth<T>; ++i) any |= int64_t(mask[i]);
  return any != 0;
}

// ---------------------------------------------------------------- products with K
// out[j] = sum_i A[i, j] x[i] for a stretch of V vectors; U rows at a time hide the latency of the additions.
template <class T, int V, int U>
KD_INLINE void add_rows_tile(const T* A, int64_t stride, int64_t rows, const T* x, T* out) {
  Vec<T> total[U][V];
  for (int r = 0; r < U; ++r)
    for (int c = 0; c < V; ++c) total[r][c] = splat<T>(0);
  int64_t i = 0;
  for (; i + U <= rows; i += U) {
    for (int r = 0; r < U; ++r) {
      const Vec<T> factor = splat<T>(x[i + r]);
      for (int c = 0; c < V; ++c) total[r][c] += factor * load(A + (i + r) * stride + c * kWidth<T>);
    }
  }
  for (; i < rows; ++i) {
    const Vec<T> factor = splat<T>(x[i]);
    for (int c = 0; c < V; ++c) total[0][c] += factor * load(A + i * stride + c * kWidth<T>);
  }
  for (int c = 0; c < V; ++c) {
    Vec<T> sum = total[0][c];
    for (int r = 1; r < U; ++r) sum += total[r][c];
    store(out + c * kWidth<T>, sum);
  }
}

template <class T>
static void add_rows(const T* A, int64_t stride, int64_t rows, const T* x, T* out) {
  constexpr int W = kWidth<T>;
  int64_t j = 0;
  for (; j + 4 * W <= stride; j += 4 * W) add_rows_tile<T, 4, 2>(A + j, stride, rows, x, out + j);
  for (; j + 2 * W <= stride; j += 2 * W) add_rows_tile<T, 2, 4>(A + j, stride, rows, x, out + j);
  if (j < stride) add_rows_tile<T, 1, 4>(A + j, stride, rows, x, out + j);
}

// s[0, R) = rows of A times x.
template <class T, int R>
KD_INLINE void dot_rows(const T* A, int64_t stride, const T* x, T* s) {
  constexpr int W = kWidth<T>;
  Vec<T> total[R];
  for (int r = 0; r < R; ++r) total[r] = splat<T>(0);
  for (int64_t j = 0; j < stride; j += W) {
    const Vec<T> factor = load(x + j);
    for (int r = 0; r < R; ++r) total[r] += factor * load(A + r * stride + j);
  }
  for (int r = 0; r < R; ++r) s[r] = sum_lanes<T>(total[r]);
}

// out[j] += sum over R rows of A[r, j] y[r]
template <class T, int R>
KD_INLINE void add_rows_to(const T* A, int64_t stride, const T* y, T* out) {
  constexpr int W = kWidth<T>;
  for (int64_t j = 0; j < stride; j += W) {
    Vec<T> sum = load(out + j);
    for (int r = 0; r < R; ++r) sum += splat<T>(y[r]) * load(A + r * stride + j);
    store(out + j, sum);
  }
}

// s = K x; update(first, end) makes y from s on those rows (whole vectors); p.sums = K^T y if `with_sums`.
template <class T, class F>
KD_INLINE void dot_then_add(const Problem<T>& p, const T* x, const F& update, const T* y, bool with_sums) {
  if (p.small) {
    add_rows(p.KT, p.np, p.m, x, p.s);
    update(int64_t{0}, p.np);
    if (with_sums) add_rows(p.K, p.mp, p.n, y, p.sums);
    return;
  }
  over_blocks(p, [&](int64_t block, int64_t begin, int64_t end) {
    T* share = p.partial + block * p.mp;
    if (with_sums) fill(share, p.mp, T(0));
    for (int64_t first = begin; first < end; first += kGroup) {
      const int64_t last = at_most(end, first + kGroup);
      int64_t i = first;
      for (; i + 4 <= last; i += 4) dot_rows<T, 4>(p.K + i * p.mp, p.mp, x, p.s + i);
      for (; i < last; ++i) dot_rows<T, 1>(p.K + i * p.mp, p.mp, x, p.s + i);
      update(first, padded<T>(last));  // kGroup is a multiple of the vector width: groups do not overlap
      if (!with_sums) continue;
      for (i = first; i + 4 <= last; i += 4) add_rows_to<T, 4>(p.K + i * p.mp, p.mp, y + i, share);
      for (; i < last; ++i) add_rows_to<T, 1>(p.K + i * p.mp, p.mp, y + i, share);
    }
  });
  if (with_sums) add_blocks(p, p.sums);
}

// p.sums = K^T y
template <class T>
KD_INLINE void add_only(const Problem<T>& p, const T* y) {
  if (p.small) return add_rows(p.K, p.mp, p.n, y, p.sums);
  over_blocks(p, [&](int64_t block, int64_t begin, int64_t end) {
    T* share = p.partial + block * p.mp;
    fill(share, p.mp, T(0));
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) add_rows_to<T, 4>(p.K + i * p.mp, p.mp, y + i, share);
    for (; i < end; ++i) add_rows_to<T, 1>(p.K + i * p.mp, p.mp, y + i, share);
  });
  add_blocks(p, p.sums);
}

// ---------------------------------------------------------------- building K, and half-steps with exponentials
// K for the current references; `each_row(i)` then works on a row that is hot. Dead points have -inf: zeros.
template <class T, class F>
KD_INLINE void build_kernel(const Problem<T>& p, const F& each_row) {
  const T scale = T(-1 / p.call->epsilon);
  over_blocks(p, [&](int64_t block, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* row = p.K + i * p.mp;
      const T shift = p.Fr[i];
      if (shift == -T(kInf)) {
        fill(row, p.mp, T(0));
      } else {
        over_row(p, i, T(kInf), [&](int64_t j, const T* cost, int64_t count) {
          for (int64_t c = 0; c < count; c += kWidth<T>) {
            const Vec<T> G = load(p.Gr + j + c), y = vexp<T>(exponent<T>(load(cost + c), scale, G, splat<T>(shift)));
            store(row + j + c, G > -T(kInf) ? y : splat<T>(0));  // a dead column's cost may be anything
          }
        });
      }
      each_row(block, i, row);
    }
  });
  if (p.small) {
    if (p.np != p.n) {
      for (int64_t j = 0; j < p.m; ++j)
        for (int64_t i = p.n; i < p.np; ++i) p.KT[j * p.np + i] = 0;
    }
    for (int64_t i = 0; i < p.n; ++i)
      for (int64_t j = 0; j < p.m; ++j) p.KT[j * p.np + i] = p.K[i * p.mp + j];
  }
}
template <class T>
static void build_kernel(const Problem<T>& p) {
  build_kernel(p, [](int64_t, int64_t, T*) {});
}

// high + low = x, in two arrays of T
template <class T>
static void split(const double* x, int64_t n, T* high, T* low) {
  for (int64_t i = 0; i < n; ++i) {
    high[i] = T(x[i]);
    low[i] = high[i] > -T(kInf) ? T(x[i] - double(high[i])) : T(0);
  }
}

// out[i] = log sum_j exp(-C_ij / epsilon + G_j), with the row's own maximum; overwrites Gr and v.
template <class T>
static void log_sums_of_rows(const Problem<T>& p, const double* G, double* out) {
  const T scale = T(-1 / p.call->epsilon);
  split(G, p.mp, p.Gr, p.v);
  over_blocks(p, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = -double(kInf);
      if (!(p.a[i] > T(0))) continue;
      Vec<T> top = splat<T>(-T(kInf)), sum = splat<T>(0);
      over_row(p, i, T(kInf), [&](int64_t j, const T* cost, int64_t count) {
        for (int64_t c = 0; c < count; c += kWidth<T>) top = vmax(top, load(cost + c) * scale + load(p.Gr + j + c));
      });
      const T shift = max_lanes<T>(top);  // finite: a live row reaches a live column
      over_row(p, i, T(kInf), [&](int64_t j, const T* cost, int64_t count) {
        for (int64_t c = 0; c < count; c += kWidth<T>) {
          const Vec<T> g = load(p.Gr + j + c);
          const Vec<T> y = vexp<T>(exponent<T>(load(cost + c), scale, g, splat<T>(-shift)) + load(p.v + j + c));
          sum += g > -T(kInf) ? y : splat<T>(0);
        }
      });
      out[i] = double(shift) + __builtin_log(sum_lanes_double<T>(sum));
    }
  });
}

// out[j] = log sum_i exp(-C_ij / epsilon + F_i), with the column's own maximum; overwrites Gr, partial and sums.
template <class T>
static void log_sums_of_columns(const Problem<T>& p, const double* F, double* out) {
  const T scale = T(-1 / p.call->epsilon);
  over_blocks(p, [&](int64_t block, int64_t begin, int64_t end) {
    T* top = p.partial + block * p.mp;
    fill(top, p.mp, -T(kInf));
    for (int64_t i = begin; i < end; ++i) {
      if (!(p.a[i] > T(0))) continue;
      over_row(p, i, T(kInf), [&](int64_t j, const T* cost, int64_t count) {
        for (int64_t c = 0; c < count; c += kWidth<T>) store(top + j + c, vmax(load(top + j + c), load(cost + c) * scale + T(F[i])));
      });
    }
  });
  T* const top = p.Gr;
  for (int64_t j = 0; j < p.mp; j += kWidth<T>) {
    Vec<T> most = load(p.partial + j);
    for (int64_t block = 1; block < p.blocks; ++block) most = vmax(most, load(p.partial + block * p.mp + j));
    store(top + j, most > -T(kInf) ? most : splat<T>(0));  // an unreachable column: its exponentials are all 0
  }
  over_blocks(p, [&](int64_t block, int64_t begin, int64_t end) {
    T* share = p.partial + block * p.mp;
    fill(share, p.mp, T(0));
    for (int64_t i = begin; i < end; ++i) {
      if (!(p.a[i] > T(0))) continue;
      const T high = T(F[i]), low = T(F[i] - double(high));
      over_row(p, i, T(kInf), [&](int64_t j, const T* cost, int64_t count) {
        for (int64_t c = 0; c < count; c += kWidth<T>) {
          const Vec<T> x = exponent<T>(load(cost + c), scale, splat<T>(high), -load(top + j + c)) + low;
          store(share + j + c, load(share + j + c) + vexp<T>(x));
        }
      });
    }
  });
  add_blocks(p, p.sums);
  for (int64_t j = 0; j < p.mp; ++j) out[j] = p.b[j] > T(0) ? double(top[j]) + __builtin_log(double(p.sums[j])) : -double(kInf);
}

// ---------------------------------------------------------------- weights and references
template <class T>
static void load_weights(const Problem<T>& p, const void* given, int64_t n, int64_t np, T* w) {
  for (int64_t i = 0; i < n; ++i) {
    w[i] = given ? static_cast<const T*>(given)[p.index * n + i] : T(1);
    if (!(w[i] >= T(0))) p.call->status->report(p.index, Bad::teacher);
  }
  for (int64_t i = n; i < np; ++i) w[i] = 0;
}

template <class T>
static void log_weights(const T* w, int64_t np, T* out) {
  for (int64_t i = 0; i < np; i += kWidth<T>) {
    const Vec<T> x = load(w + i);
    store(out + i, x > T(0) ? vlog<T>(vmax(x, splat<T>(Limits<T>::tiny))) : splat<T>(-T(kInf)));
  }
}

// The nearest T as the reference, and what is left of F as the factor.
template <class T>
static void refer(const double* F, const T* w, int64_t np, T* ref, T* factor) {
  split(F, np, ref, factor);
  for (int64_t i = 0; i < np; i += kWidth<T>) store(factor + i, load(w + i) > T(0) ? vexp<T>(load(factor + i)) : splat<T>(0));
}

template <class T>
KD_INLINE void swap(T*& a, T*& b) {
  T* c = a;
  a = b;
  b = c;
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kdfast

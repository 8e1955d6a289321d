// Equations (4) to (6) of kdfast/ops/sinkhorn.py. Every softmax weight is K_ij times a factor of the row and one of the
// column, so each half-step adds one rank-one term K_ij L_i R_j to the gradient: they are kept as rows of L [terms, np]
// and R [terms, mp] and all added in one pass over K.
#pragma once

#include "cpu/sinkhorn_passes.h"

namespace kdfast {
namespace KD_ISA {
namespace {

template <class T>
struct Reverse {
  Problem<T>& p;
  T* L;
  T* R;
  T* D;              // [n, mp] gradient so far, if K had to be built anew on the way
  T *df, *dg, *row_factor;
  double *sum_f, *sum_g;  // sums over the iterations of df, dg at their half-steps, for the weights' gradients
  int64_t terms = 0;
  bool first_flush = true;

  const double* saved_f(int64_t k) const { return p.call->saved + (p.index * p.call->iters + k - 1) * (p.n + p.m); }
  const double* saved_g(int64_t k) const { return saved_f(k) + p.n; }
};

template <class T>
KD_INLINE void take_reverse(Arena& arena, const SinkhornCall& call, Reverse<T>& r) {
  const Problem<T>& p = r.p;
  r.L = Arena::take<T>(arena, 2 * call.iters * p.np);
  r.R = Arena::take<T>(arena, 2 * call.iters * p.mp);
  r.df = Arena::take<T>(arena, p.np);
  r.row_factor = Arena::take<T>(arena, p.np);
  r.dg = Arena::take<T>(arena, p.mp);
  r.sum_f = Arena::take<double>(arena, p.np);
  r.sum_g = Arena::take<double>(arena, p.mp);
  r.D = Arena::take<T>(arena, p.n * p.mp);
}

// The potentials of iteration k (0: the start) into padded arrays.
template <class T>
static void load_potentials(const double* from, const T* w, int64_t n, int64_t np, double* out) {
  for (int64_t i = 0; i < np; ++i) out[i] = w[i] > T(0) ? (from && i < n ? from[i] : 0.0) : -double(kInf);
}

// out = factor exp(F / lam - log_w - ref) or, without log_w, factor exp(F / lam - ref); 0 where dead. False if out of range.
template <class T>
static bool relative(const double* F, T lam, const T* log_w, const T* ref, const T* w, int64_t np, T factor, T* out) {
  const T drift = Limits<T>::drift;
  const double inverse = 1 / double(lam);
  IVec<T> bad = {};
  for (int64_t i = 0; i < np; i += kWidth<T>) {
    const auto live = load(w + i) > T(0);
    Wide<T> wide = load_wide<T>(F + i) * inverse - widen<T>(load(ref + i));
    if (log_w) wide -= widen<T>(load(log_w + i));
    const Vec<T> x = live ? narrow<T>(wide) : splat<T>(0);
    bad |= !((x <= drift) & (x >= -drift));
    store(out + i, live ? factor * vexp<T>(x) : splat<T>(0));
  }
  return !any_lane<T>(bad);
}

// Adds the kept terms for a stretch of `width` vectors of V rows: out[r][c] = sum_t L[t][i + r] R[t][j + c]
template <class T, int V>
KD_INLINE void sum_terms(const T* L, int64_t np, const T* R, int64_t mp, int64_t terms, Vec<T> (&out)[V]) {
  for (int r = 0; r < V; ++r) out[r] = splat<T>(0);
  for (int64_t t = 0; t < terms; ++t) {
    const Vec<T> column = load(R + t * mp);
    for (int r = 0; r < V; ++r) out[r] += L[t * np + r] * column;
  }
}

// Gradient so far += the direct part (first time) and the kept terms, for this K. `last` writes it to its place.
template <class T>
static void flush(Reverse<T>& r, bool last) {
  const Problem<T>& p = r.p;
  const SinkhornCall& call = *p.call;
  const T gv = call.grad_value ? static_cast<const T*>(call.grad_value)[p.index] : T(0);
  const T* grad_plan = static_cast<const T*>(call.grad_plan);
  const T inverse = T(1 / call.epsilon);
  over_blocks(p, [&](int64_t, int64_t begin, int64_t end) {
    alignas(64) T out[4][kStage], staged_plan[kStage];
    for (int64_t i = begin; i < end; i += 4) {
      const int64_t group = at_most(4, end - i);  // L is padded, so a group of 4 can always be read
      for (int64_t start = 0; start < p.m; start += kStage) {
        const int64_t count = at_most(kStage, p.m - start), wide = padded<T>(count);
        for (int64_t c = 0; c < wide; c += kWidth<T>) {
          Vec<T> total[4];
          sum_terms<T, 4>(r.L + i, p.np, r.R + start + c, p.mp, r.terms, total);
          for (int64_t q = 0; q < group; ++q) store(out[q] + c, total[q] * load(p.K + (i + q) * p.mp + start + c));
        }
        for (int64_t q = 0; q < group; ++q) {
          T* before = r.D + (i + q) * p.mp + start;
          if (r.first_flush) {  // K with u and v is the plan here
            const T* plan_row = grad_plan ? grad_plan + (p.index * p.n + i + q) * p.m + start : nullptr;
            if (plan_row) {
              std::memcpy(staged_plan, plan_row, std::size_t(count) * sizeof(T));
              for (int64_t c = count; c < wide; ++c) staged_plan[c] = 0;
            }
            alignas(64) T buffer[kStage];
            const T* cost = cost_row(p, i + q, start, count, T(0), buffer);
            for (int64_t c = 0; c < wide; c += kWidth<T>) {
              const Vec<T> x = load(cost + c), known = x < T(kInf) ? x : splat<T>(0);
              const Vec<T> upstream = gv * known + (plan_row ? load(staged_plan + c) : splat<T>(0));
              const Vec<T> mass = load(p.K + (i + q) * p.mp + start + c) * load(p.v + start + c) * p.u[i + q];
              store(out[q] + c, load(out[q] + c) + mass * (call.envelope ? splat<T>(gv) : gv - upstream * inverse));
            }
          } else {
            for (int64_t c = 0; c < wide; c += kWidth<T>) store(out[q] + c, load(out[q] + c) + load(before + c));
          }
          if (last) {
            const Logits& grad = call.grad_cost;
            store_logits(out[q], count, grad, row_offset(call.rows, grad, p.index * p.n + i + q) + start * grad.class_stride, grad.class_stride);
          } else {
            std::memcpy(before, out[q], std::size_t(wide) * sizeof(T));
          }
        }
      }
    }
  });
  r.terms = 0;
  r.first_flush = false;
}

template <class T>
static void refer_to(Reverse<T>& r, const double* F, T lam_a, const T* log_a, const double* G, T lam_b, const T* log_b) {
  const Problem<T>& p = r.p;
  flush(r, false);
  const double inverse_a = 1 / double(lam_a), inverse_b = 1 / double(lam_b);
  for (int64_t i = 0; i < p.np; ++i) p.Fr[i] = p.a[i] > T(0) ? T(F[i] * inverse_a - (log_a ? double(log_a[i]) : 0.0)) : -T(kInf);
  for (int64_t j = 0; j < p.mp; ++j) p.Gr[j] = p.b[j] > T(0) ? T(G[j] * inverse_b - (log_b ? double(log_b[j]) : 0.0)) : -T(kInf);
  build_kernel(p);
}

template <class T>
static void accumulate(double* sums, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sums[i] += double(x[i]);
}

// Reverse of a columns' half-step that read F and gave G, then of a rows' half-step that gave F and read G_before.
// `columns` or `rows` false leaves that one out; `to_rows` / `to_columns`: the gradient of what it read is wanted.
// `fresh`: K was built for this half-step, so its factors are 1 but for rounding.
template <class T>
static void reverse_pair(Reverse<T>& r, const double* F, const double* G, const double* G_before, bool columns, bool rows, bool to_rows, bool to_columns,
                         bool fresh = false) {
  const Problem<T>& p = r.p;
  const T lam_a = T(p.call->lam_a), lam_b = T(p.call->lam_b);
  T* z = r.R + r.terms * p.mp;                          // columns' term: exp(F - Fr) x z
  T* left = r.L + r.terms * p.np;
  T* y = r.L + (r.terms + (columns ? 1 : 0)) * p.np;    // rows' term: y x exp(G_before - Gr)
  T* right = r.R + (r.terms + (columns ? 1 : 0)) * p.mp;
  bool near = true;
  if (columns) {
    near &= relative(F, T(1), static_cast<const T*>(nullptr), p.Fr, p.a, p.np, T(1), left);
    near &= relative(G, lam_b, p.log_b, p.Gr, p.b, p.mp, lam_b, z);
  }
  if (rows) {
    near &= relative(F, lam_a, p.log_a, p.Fr, p.a, p.np, lam_a, r.row_factor);
    near &= relative(G_before, T(1), static_cast<const T*>(nullptr), p.Gr, p.b, p.mp, T(1), right);
  }
  if (!near && !fresh) {
    if (columns && rows) {  // one K cannot serve both: each gets its own
      reverse_pair(r, F, G, G_before, true, false, to_rows, to_columns);
      return reverse_pair(r, F, G, G_before, false, true, to_rows, to_columns);
    }
    if (columns) {
      refer_to(r, F, T(1), static_cast<const T*>(nullptr), G, lam_b, p.log_b);
    } else {
      refer_to(r, F, lam_a, p.log_a, G_before, T(1), static_cast<const T*>(nullptr));
    }
    return reverse_pair(r, F, G, G_before, columns, rows, to_rows, to_columns, true);
  }
  if (columns) {
    accumulate(r.sum_g, r.dg, p.m);
    for (int64_t j = 0; j < p.mp; j += kWidth<T>) store(z + j, load(z + j) * load(r.dg + j));
    fill(r.dg, p.mp, T(0));
  }
  const auto update = [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; i += kWidth<T>) {
      Vec<T> df = load(r.df + i);
      if (columns) df -= load(left + i) * load(p.s + i);
      store(r.df + i, df);
      if (rows) store(y + i, load(r.row_factor + i) * df);
    }
  };
  if (columns && to_rows) {
    dot_then_add(p, z, update, y, rows && to_columns);
  } else {
    if (rows) update(0, p.np);  // not after a columns' step, see the calls
    if (rows && to_columns) add_only(p, y);
  }
  if (rows) {
    accumulate(r.sum_f, r.df, p.n);
    fill(r.df, p.np, T(0));
    if (to_columns) {
      for (int64_t j = 0; j < p.mp; j += kWidth<T>) store(r.dg + j, load(r.dg + j) - load(right + j) * load(p.sums + j));
    }
  }
  r.terms += int64_t(columns) + int64_t(rows);
}

// df = A 1 / epsilon, dg = A^T 1 / epsilon with A = P (grad_value C + grad_plan), plus the potentials' own gradients.
template <class T>
static void start_reverse(Reverse<T>& r) {
  const Problem<T>& p = r.p;
  const SinkhornCall& call = *p.call;
  const T gv = call.grad_value ? static_cast<const T*>(call.grad_value)[p.index] : T(0);
  const T* grad_plan = static_cast<const T*>(call.grad_plan);
  for (int64_t block = 0; block < p.blocks; ++block) fill(p.partial + block * p.mp, p.mp, T(0));
  build_kernel(p, [&](int64_t block, int64_t i, T* row) {
    T* share = p.partial + block * p.mp;
    Vec<T> sum = splat<T>(0);
    alignas(64) T staged[kStage];
    over_row(p, i, T(0), [&](int64_t j, const T* cost, int64_t count) {
      if (grad_plan) {
        const int64_t inside = at_most(count, p.m - j);
        std::memcpy(staged, grad_plan + (p.index * p.n + i) * p.m + j, std::size_t(inside) * sizeof(T));
        for (int64_t c = inside; c < count; ++c) staged[c] = 0;
      }
      for (int64_t c = 0; c < count; c += kWidth<T>) {
        const Vec<T> x = load(cost + c);
        const Vec<T> upstream = gv * (x < T(kInf) ? x : splat<T>(0)) + (grad_plan ? load(staged + c) : splat<T>(0));
        const Vec<T> A = load(row + j + c) * load(p.v + j + c) * p.u[i] * upstream;
        sum += A;
        store(share + j + c, load(share + j + c) + A);
      }
    });
    r.df[i] = sum_lanes<T>(sum);
  });
  add_blocks(p, p.sums);
  const T inverse = T(1 / call.epsilon);
  for (int64_t i = 0; i < p.np; ++i) {
    r.df[i] = i < p.n ? r.df[i] * inverse : T(0);
    if (call.grad_f && p.a[i] > T(0)) r.df[i] += static_cast<const T*>(call.grad_f)[p.index * p.n + i];
  }
  for (int64_t j = 0; j < p.mp; ++j) {
    r.dg[j] = p.sums[j] * inverse;
    if (call.grad_g && p.b[j] > T(0)) r.dg[j] += static_cast<const T*>(call.grad_g)[p.index * p.m + j];
  }
}

template <class T>
static void weight_gradient(const double* sums, const T* w, int64_t n, double factor, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = w[i] > T(0) ? T(factor * sums[i] / double(w[i])) : T(0);
}

template <class T>
static void reverse(Problem<T>& p, Reverse<T>& r) {
  const SinkhornCall& call = *p.call;
  const int64_t done = call.iterations[p.index];
  load_weights(p, call.a, p.n, p.np, p.a);
  load_weights(p, call.b, p.m, p.mp, p.b);
  for (int64_t i = 0; i < p.n; ++i)  // dead, whatever the reason: the forward left -inf
    if (!(r.saved_f(done)[i] > -T(kInf))) p.a[i] = 0;
  for (int64_t j = 0; j < p.m; ++j)
    if (!(r.saved_g(done)[j] > -T(kInf))) p.b[j] = 0;
  log_weights(p.a, p.np, p.log_a);
  log_weights(p.b, p.mp, p.log_b);
  load_potentials(r.saved_f(done), p.a, p.n, p.np, p.F);
  load_potentials(r.saved_g(done), p.b, p.m, p.mp, p.G);
  refer(p.F, p.a, p.np, p.Fr, p.u);
  refer(p.G, p.b, p.mp, p.Gr, p.v);
  for (int64_t i = 0; i < p.np; ++i) r.sum_f[i] = 0;
  for (int64_t j = 0; j < p.mp; ++j) r.sum_g[j] = 0;
  r.terms = 0;
  r.first_flush = true;
  if (call.envelope) {
    build_kernel(p);
    return flush(r, true);
  }
  start_reverse(r);
  const auto f = [&](int64_t k, double* out) { load_potentials(k ? r.saved_f(k) : nullptr, p.a, p.n, p.np, out); };
  const auto g = [&](int64_t k, double* out) { load_potentials(k ? r.saved_g(k) : nullptr, p.b, p.m, p.mp, out); };
  if (call.rows_first) {
    g(done, p.G);
    for (int64_t k = done; k >= 1; --k) {
      f(k, p.F);
      g(k - 1, p.G_old);
      reverse_pair(r, p.F, p.G, p.G_old, true, true, true, k > 1);
      swap(p.G, p.G_old);
    }
  } else {
    f(done, p.F);
    g(done, p.G);
    reverse_pair(r, p.F, p.G, p.G, false, true, false, true);
    for (int64_t k = done; k >= 2; --k) {
      f(k - 1, p.F);
      g(k - 1, p.G_old);
      reverse_pair(r, p.F, p.G, p.G_old, true, true, true, true);
      swap(p.G, p.G_old);
    }
    f(0, p.F);
    reverse_pair(r, p.F, p.G, p.G, true, false, false, false);
  }
  flush(r, true);
  if (call.grad_a) weight_gradient(r.sum_f, p.a, p.n, call.lam_a * call.epsilon, static_cast<T*>(call.grad_a) + p.index * p.n);
  if (call.grad_b) weight_gradient(r.sum_g, p.b, p.m, call.lam_b * call.epsilon, static_cast<T*>(call.grad_b) + p.index * p.m);
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kdfast

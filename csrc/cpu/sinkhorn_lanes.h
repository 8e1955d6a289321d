// Many small problems of one size: one problem per vector lane. Every product with K is then a chain of fused
// multiply-adds over whole vectors, no sum crosses lanes, and one division serves as many problems as there are lanes.
//
// Only what most calls are: float, balanced, no convergence test, positive weights, and costs so small next to epsilon that
// K = exp(-C / epsilon) serves every iteration (sinkhorn_passes.h, Limits::plain). A group that is not, or whose factors
// leave that range on the way, returns false and is solved one problem after the other.
#pragma once

#include "cpu/sinkhorn_passes.h"

namespace kdfast {
namespace KD_ISA {
namespace {

constexpr int kLanes = kWidth<float>;
constexpr int64_t kLaneEntries = 1024;  // of a cost matrix: beyond that a row fills vectors by itself

KD_INLINE bool lanes_fit(const SinkhornCall& call) {
  return !call.f64 && call.lam_a == 1 && call.lam_b == 1 && call.tol < 0 && call.n * call.m <= kLaneEntries && call.batch >= kLanes;
}

// One group of kLanes problems. x[e] of a problem lies at x + e * kLanes + lane.
struct Group {
  const SinkhornCall* call;
  int64_t first, n, m;
  float *C, *K, *a, *b;
  float *work;         // [n, m]
  float *u, *v;        // one iteration, where nothing is saved
  float *df, *dg, *sum_f, *sum_g, *ones;
  float *y, *z;        // [iters, n], [iters, m]: half of each rank-one term of the gradient; the factors are the other half
  const float **left, **right;  // [2 iters]
};

KD_INLINE void take_group(Arena& arena, const SinkhornCall& call, bool backward, Group& g) {
  g.call = &call;
  g.n = call.n, g.m = call.m;
  const int64_t longest = g.n > g.m ? g.n : g.m;
  float** const tables[] = {&g.C, &g.K, &g.work};
  for (float** table : tables) *table = Arena::take<float>(arena, g.n * g.m * kLanes);
  float** const rows[] = {&g.a, &g.u, &g.df, &g.sum_f};
  for (float** row : rows) *row = Arena::take<float>(arena, g.n * kLanes);
  float** const columns[] = {&g.b, &g.v, &g.dg, &g.sum_g};
  for (float** column : columns) *column = Arena::take<float>(arena, g.m * kLanes);
  g.ones = Arena::take<float>(arena, longest * kLanes);
  if (!backward) return;
  g.y = Arena::take<float>(arena, call.iters * g.n * kLanes);
  g.z = Arena::take<float>(arena, call.iters * g.m * kLanes);
  g.left = Arena::take<const float*>(arena, 2 * call.iters);
  g.right = Arena::take<const float*>(arena, 2 * call.iters);
}

// The group's part of call.saved holds the factors u [n] and v [m] of every iteration, as floats by lane: half of it. Its
// last double is then NaN, which no potential is.
KD_INLINE double* slab(const Group& g) { return g.call->saved + g.first * g.call->iters * (g.n + g.m); }
KD_INLINE double* mark(const Group& g) { return slab(g) + kLanes * g.call->iters * (g.n + g.m) - 1; }
KD_INLINE float* saved_u(const Group& g, int64_t k) { return reinterpret_cast<float*>(slab(g)) + (k - 1) * (g.n + g.m) * kLanes; }
KD_INLINE float* saved_v(const Group& g, int64_t k) { return saved_u(g, k) + g.n * kLanes; }

// entries[problem][e] <-> by lane
KD_INLINE void to_lanes(const float* entries, int64_t count, float* out) {
  for (int q = 0; q < kLanes; ++q)
    for (int64_t e = 0; e < count; ++e) out[e * kLanes + q] = entries[q * count + e];
}
KD_INLINE void from_lanes(const float* in, int64_t count, float* entries) {
  for (int q = 0; q < kLanes; ++q)
    for (int64_t e = 0; e < count; ++e) entries[q * count + e] = in[e * kLanes + q];
}

// s_i = sum_j K_ij x_j, given to use(i, s_i)
template <int R, class F>
KD_INLINE void some_rows(const Group& g, const float* x, int64_t i, const F& use) {
  Vec<float> s[R];
  for (int r = 0; r < R; ++r) s[r] = splat(0.0f);
  for (int64_t j = 0; j < g.m; ++j) {
    const Vec<float> xj = load(x + j * kLanes);
    for (int r = 0; r < R; ++r) s[r] += load(g.K + ((i + r) * g.m + j) * kLanes) * xj;
  }
  for (int r = 0; r < R; ++r) use(i + r, s[r]);
}
template <class F>
KD_INLINE void times_rows(const Group& g, const float* x, const F& use) {
  int64_t i = 0;
  for (; i + 8 <= g.n; i += 8) some_rows<8>(g, x, i, use);
  for (; i + 2 <= g.n; i += 2) some_rows<2>(g, x, i, use);
  if (i < g.n) some_rows<1>(g, x, i, use);
}

// t_j = sum_i K_ij x_i, given to use(j, t_j)
template <int R, class F>
KD_INLINE void some_columns(const Group& g, const float* x, int64_t j, const F& use) {
  Vec<float> t[R];
  for (int r = 0; r < R; ++r) t[r] = splat(0.0f);
  for (int64_t i = 0; i < g.n; ++i) {
    const Vec<float> xi = load(x + i * kLanes);
    for (int r = 0; r < R; ++r) t[r] += load(g.K + (i * g.m + j + r) * kLanes) * xi;
  }
  for (int r = 0; r < R; ++r) use(j + r, t[r]);
}
template <class F>
KD_INLINE void times_columns(const Group& g, const float* x, const F& use) {
  int64_t j = 0;
  for (; j + 8 <= g.m; j += 8) some_columns<8>(g, x, j, use);
  for (; j + 2 <= g.m; j += 2) some_columns<2>(g, x, j, use);
  if (j < g.m) some_columns<1>(g, x, j, use);
}

KD_INLINE bool load_lane_weights(const void* weights, int64_t first, int64_t count, float* out) {
  if (!weights) {
    for (int64_t e = 0; e < count; ++e) store(out + e * kLanes, splat(1.0f));
    return true;
  }
  to_lanes(static_cast<const float*>(weights) + first * count, count, out);
  IVec<float> bad = {};
  for (int64_t e = 0; e < count; ++e) bad |= !(load(out + e * kLanes) > 0.0f);
  return !any_lane<float>(bad);
}

// Costs, weights and K of the group; false where these are not all plain.
static bool load_group(Group& g) {
  const SinkhornCall& call = *g.call;
  alignas(64) float row[kLaneEntries + kLanes];
  for (int q = 0; q < kLanes; ++q) {
    for (int64_t i = 0; i < g.n; ++i) {
      load_logits(call.cost, row_offset(call.rows, call.cost, (g.first + q) * g.n + i), call.cost.class_stride, g.m, row);
      for (int64_t j = 0; j < g.m; ++j) g.C[(i * g.m + j) * kLanes + q] = row[j];
    }
  }
  if (!load_lane_weights(call.a, g.first, g.n, g.a) || !load_lane_weights(call.b, g.first, g.m, g.b)) return false;
  const float inverse = float(1 / call.epsilon), most = float(Limits<float>::plain * call.epsilon);
  IVec<float> bad = {};
  for (int64_t e = 0; e < g.n * g.m; ++e) {
    const Vec<float> c = load(g.C + e * kLanes);
    bad |= !(vabs<float>(c) <= most);
    store(g.K + e * kLanes, vexp_bounded<float>(-c * inverse));
  }
  const int64_t longest = g.n > g.m ? g.n : g.m;
  for (int64_t e = 0; e < longest; ++e) store(g.ones + e * kLanes, splat(1.0f));
  return !any_lane<float>(bad);
}

static bool solve_group(Group& g) {
  const SinkhornCall& call = *g.call;
  if (!load_group(g)) return false;
  const float low = vexp<float>(splat(-Limits<float>::plain))[0], high = vexp<float>(splat(Limits<float>::plain))[0];
  IVec<float> bad = {};
  float *u = g.ones, *v = g.ones;  // the start: f = g = 0
  for (int64_t k = 1; k <= call.iters; ++k) {
    float* next_u = call.saved ? saved_u(g, k) : g.u;
    float* next_v = call.saved ? saved_v(g, k) : g.v;
    const auto rows = [&] {
      times_rows(g, v, [&](int64_t i, Vec<float> s) {
        const Vec<float> factor = load(g.a + i * kLanes) / s;
        bad |= !((factor >= low) & (factor <= high));
        store(next_u + i * kLanes, factor);
      });
      u = next_u;
    };
    const auto columns = [&] {
      times_columns(g, u, [&](int64_t j, Vec<float> t) {
        const Vec<float> factor = load(g.b + j * kLanes) / t;
        bad |= !((factor >= low) & (factor <= high));
        store(next_v + j * kLanes, factor);
      });
      v = next_v;
    };
    if (call.rows_first) {
      rows();
      columns();
    } else {
      columns();
      rows();
    }
    if (any_lane<float>(bad)) return false;
  }
  if (call.saved) *mark(g) = __builtin_nan("");
  for (int q = 0; call.iterations && q < kLanes; ++q) call.iterations[g.first + q] = call.iters;
  const auto potential = [&](const float* factors, int64_t count, void* out) {
    if (!out) return;
    for (int64_t e = 0; e < count; ++e) store(g.work + e * kLanes, vlog<float>(load(factors + e * kLanes)) * float(call.epsilon));
    from_lanes(g.work, count, static_cast<float*>(out) + g.first * count);
  };
  potential(u, g.n, call.f);
  potential(v, g.m, call.g);
  if (!call.plan && !call.value) return true;
  Vec<float> value = splat(0.0f);
  for (int64_t i = 0; i < g.n; ++i) {
    Vec<float> row = splat(0.0f);
    for (int64_t j = 0; j < g.m; ++j) {
      const int64_t at = (i * g.m + j) * kLanes;
      const Vec<float> mass = load(g.K + at) * load(v + j * kLanes) * load(u + i * kLanes);
      row += mass * load(g.C + at);
      store(g.work + at, mass);
    }
    value += row;
  }
  if (call.plan) from_lanes(g.work, g.n * g.m, static_cast<float*>(call.plan) + g.first * g.n * g.m);
  if (call.value) store(static_cast<float*>(call.value) + g.first, value);
  return true;
}

// Whether solve_group left its factors for these problems.
KD_INLINE bool was_solved_in_lanes(const Group& g) { return *mark(g) != *mark(g); }

// work_ij += K_ij sum_t left_t,i right_t,j for a tile of rows and columns
template <int R, int S>
KD_INLINE void add_terms(const Group& g, int64_t terms, int64_t i, int64_t j) {
  Vec<float> total[R][S];
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < S; ++s) total[r][s] = splat(0.0f);
  for (int64_t t = 0; t < terms; ++t) {
    Vec<float> right[S];
    for (int s = 0; s < S; ++s) right[s] = load(g.right[t] + (j + s) * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec<float> left = load(g.left[t] + (i + r) * kLanes);
      for (int s = 0; s < S; ++s) total[r][s] += left * right[s];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int s = 0; s < S; ++s) {
      float* at = g.work + ((i + r) * g.m + j + s) * kLanes;
      store(at, load(at) + load(g.K + (at - g.work)) * total[r][s]);
    }
  }
}
template <int R>
KD_INLINE void add_terms_of_rows(const Group& g, int64_t terms, int64_t i) {
  int64_t j = 0;
  for (; j + 4 <= g.m; j += 4) add_terms<R, 4>(g, terms, i, j);
  for (; j < g.m; ++j) add_terms<R, 1>(g, terms, i, j);
}

// The reverse of sinkhorn_reverse.h with one K throughout: the factors of every half-step are u and v themselves.
static void reverse_group(Group& g) {
  const SinkhornCall& call = *g.call;
  load_group(g);
  const int64_t done = call.iters, n = g.n, m = g.m;
  const auto u_of = [&](int64_t k) { return k ? saved_u(g, k) : g.ones; };
  const auto v_of = [&](int64_t k) { return k ? saved_v(g, k) : g.ones; };
  const float *u = u_of(done), *v = v_of(done);
  const Vec<float> gv = call.grad_value ? load(static_cast<const float*>(call.grad_value) + g.first) : splat(0.0f);
  const float inverse = float(1 / call.epsilon);
  const bool with_plan = call.grad_plan && !call.envelope;
  if (with_plan) to_lanes(static_cast<const float*>(call.grad_plan) + g.first * n * m, n * m, g.work);
  const auto start = [&](const void* upstream, int64_t count, float* out) {
    if (upstream) {
      to_lanes(static_cast<const float*>(upstream) + g.first * count, count, out);
    } else {
      for (int64_t e = 0; e < count; ++e) store(out + e * kLanes, splat(0.0f));
    }
  };
  start(call.grad_f, n, g.df);
  start(call.grad_g, m, g.dg);
  start(nullptr, n, g.sum_f);
  start(nullptr, m, g.sum_g);
  for (int64_t i = 0; i < n; ++i) {
    Vec<float> df = splat(0.0f);
    for (int64_t j = 0; j < m; ++j) {
      const int64_t at = (i * m + j) * kLanes;
      const Vec<float> mass = load(g.K + at) * load(v + j * kLanes) * load(u + i * kLanes);
      const Vec<float> upstream = (gv * load(g.C + at) + (with_plan ? load(g.work + at) : splat(0.0f))) * inverse;
      store(g.work + at, mass * (call.envelope ? gv : gv - upstream));
      df += mass * upstream;
      store(g.dg + j * kLanes, load(g.dg + j * kLanes) + mass * upstream);
    }
    store(g.df + i * kLanes, load(g.df + i * kLanes) + df);
  }
  int64_t terms = 0, y_rows = 0, z_rows = 0;
  // The part of a rank-one term that a half-step's own potential makes: d factor / weight; d is then used up.
  const auto term = [](float* sum, float* d, const float* factor, const float* weight, int64_t count, float* out) {
    for (int64_t e = 0; e < count * kLanes; e += kLanes) {
      const Vec<float> gradient = load(d + e);
      store(sum + e, load(sum + e) + gradient);
      store(out + e, gradient * load(factor + e) / load(weight + e));
      store(d + e, splat(0.0f));
    }
  };
  // Reverse of v_out = b / K^T u_in; with `on`, what u_in gets of it.
  const auto columns = [&](const float* u_in, const float* v_out, bool on) {
    float* z = g.z + z_rows++ * m * kLanes;
    term(g.sum_g, g.dg, v_out, g.b, m, z);
    g.left[terms] = u_in, g.right[terms++] = z;
    if (!on) return;
    times_rows(g, z, [&](int64_t i, Vec<float> s) { store(g.df + i * kLanes, load(g.df + i * kLanes) - load(u_in + i * kLanes) * s); });
  };
  // Reverse of u_out = a / K v_in.
  const auto rows = [&](const float* u_out, const float* v_in, bool on) {
    float* y = g.y + y_rows++ * n * kLanes;
    term(g.sum_f, g.df, u_out, g.a, n, y);
    g.left[terms] = y, g.right[terms++] = v_in;
    if (!on) return;
    times_columns(g, y, [&](int64_t j, Vec<float> t) { store(g.dg + j * kLanes, load(g.dg + j * kLanes) - load(v_in + j * kLanes) * t); });
  };
  if (!call.envelope) {
    for (int64_t k = done; k >= 1; --k) {
      if (call.rows_first) {
        columns(u_of(k), v_of(k), true);
        rows(u_of(k), v_of(k - 1), k > 1);
      } else {
        rows(u_of(k), v_of(k), true);
        columns(u_of(k - 1), v_of(k), k > 1);
      }
    }
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) add_terms_of_rows<4>(g, terms, i);
    for (; i < n; ++i) add_terms_of_rows<1>(g, terms, i);
  }
  alignas(64) float row[kLaneEntries + kLanes];
  for (int q = 0; q < kLanes; ++q) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < m; ++j) row[j] = g.work[(i * m + j) * kLanes + q];
      const Logits& grad = call.grad_cost;
      store_logits(row, m, grad, row_offset(call.rows, grad, (g.first + q) * n + i), grad.class_stride);
    }
  }
  const auto weights = [&](const float* sums, const float* w, int64_t count, void* out) {
    if (!out || call.envelope) return;
    for (int64_t e = 0; e < count * kLanes; e += kLanes) store(g.work + e, load(sums + e) * float(call.epsilon) / load(w + e));
    from_lanes(g.work, count, static_cast<float*>(out) + g.first * count);
  };
  weights(g.sum_f, g.a, n, call.grad_a);
  weights(g.sum_g, g.b, m, call.grad_b);
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kdfast

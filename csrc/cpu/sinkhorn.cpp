// CPU kernels of Sinkhorn's iterations and their exact reverse. Passes over K and when they are safe: sinkhorn_passes.h.
//
// A problem starts with zero references (K = exp(-C / epsilon)) if max |C| / epsilon <= Limits::plain. Otherwise, and
// whenever a factor u or v leaves exp(+-drift), the iteration is done with exponentials, each row and column with its own
// maximum, and K is built anew around the potentials it gave.
//
// Many small problems run side by side, one lane (sinkhorn_lanes.h) or one thread each; large ones one after the other, their
// rows shared by the threads.
#include "cpu/sinkhorn.h"

#include "cpu/sinkhorn_lanes.h"
#include "cpu/sinkhorn_reverse.h"

namespace kdfast {
namespace KD_ISA {
namespace {

// ---------------------------------------------------------------- weights, and what is dead
template <class T>
static bool any_positive(const T* w, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (w[i] > T(0)) return true;
  return false;
}

// Loads the weights, finds bad costs, marks points dead that can reach nothing; returns max |C| over what counts.
template <class T>
static T examine(const Problem<T>& p) {
  const SinkhornCall& call = *p.call;
  load_weights(p, call.a, p.n, p.np, p.a);
  load_weights(p, call.b, p.m, p.mp, p.b);
  if (!any_positive(p.a, p.n) || !any_positive(p.b, p.m)) {
    fill(p.a, p.np, T(0));
    fill(p.b, p.mp, T(0));
  }
  int forbidden = 0;
  over_blocks(p, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      p.row_values[i] = 0;
      if (!(p.a[i] > T(0))) continue;
      Vec<T> top = splat<T>(0);
      IVec<T> infinite = {}, bad = {};
      over_row(p, i, T(0), [&](int64_t j, const T* cost, int64_t count) {
        for (int64_t c = 0; c < count; c += kWidth<T>) {
          const Vec<T> x = load(p.b + j + c) > T(0) ? load(cost + c) : splat<T>(0);
          infinite |= x == T(kInf);
          bad |= !(x > -T(kInf));
          top = vmax(top, x == T(kInf) ? splat<T>(0) : vabs<T>(x));
        }
      });
      if (any_lane<T>(bad)) call.status->report(p.index * p.n + i, Bad::student);
      if (any_lane<T>(infinite)) __atomic_store_n(&forbidden, 1, __ATOMIC_RELAXED);
      p.row_values[i] = double(max_lanes<T>(top));
    }
  });
  double top = 0;
  for (int64_t i = 0; i < p.n; ++i) top = p.row_values[i] > top ? p.row_values[i] : top;
  if (forbidden) {
    over_blocks(p, [&](int64_t block, int64_t begin, int64_t end) {
      T* reached = p.partial + block * p.mp;
      fill(reached, p.mp, T(0));
      for (int64_t i = begin; i < end; ++i) {
        if (!(p.a[i] > T(0))) continue;
        IVec<T> reaches = {};
        over_row(p, i, T(kInf), [&](int64_t j, const T* cost, int64_t count) {
          for (int64_t c = 0; c < count; c += kWidth<T>) {
            const IVec<T> open = (load(p.b + j + c) > T(0)) & (load(cost + c) < T(kInf));
            reaches |= open;
            store(reached + j + c, open ? splat<T>(1) : load(reached + j + c));
          }
        });
        if (!any_lane<T>(reaches)) p.a[i] = 0;
      }
    });
    add_blocks(p, p.sums);
    for (int64_t j = 0; j < p.m; ++j)
      if (!(p.sums[j] > T(0))) p.b[j] = 0;
  }
  log_weights(p.a, p.np, p.log_a);
  log_weights(p.b, p.mp, p.log_b);
  return T(top);
}

// ---------------------------------------------------------------- half-steps
// F = lam (log w - log s + ref) and u = exp(F - ref) on [first, end), from s = K x; false if a factor drifted away.
template <class T>
KD_INLINE bool half_step(T lam, const T* w, const T* log_w, const T* ref, const T* s, T low, T high, T* u, double* F, int64_t first,
                         int64_t end) {
  IVec<T> bad = {};
  for (int64_t i = first; i < end; i += kWidth<T>) {
    const Vec<T> weight = load(w + i), r = load(ref + i), sum = load(s + i);
    Vec<T> factor;
    Wide<T> value;
    if (lam == T(1)) {
      factor = weight / sum;
      value = widen<T>(r) + widen<T>(vlog<T>(factor));
    } else {
      value = double(lam) * (widen<T>(load(log_w + i) - vlog<T>(vmax(sum, splat<T>(Limits<T>::tiny)))) + widen<T>(r));
      factor = vexp<T>(narrow<T>(value - widen<T>(r)));
    }
    const auto live = weight > T(0);
    bad |= live & !((factor >= low) & (factor <= high) & (sum > T(0)));
    store(u + i, live ? factor : splat<T>(0));
    store_wide<T>(F + i, widen<T>(weight) > 0 ? value : Wide<T>{} - double(kInf));
  }
  return !any_lane<T>(bad);
}

// F = lam (log w - L) for log-sums L in F; dead points -inf.
template <class T>
static void log_half_step(T lam, const T* w, const T* log_w, int64_t np, double* F) {
  for (int64_t i = 0; i < np; ++i) F[i] = w[i] > T(0) ? double(lam) * (double(log_w[i]) - F[i]) : -double(kInf);
}

template <class T>
static void start_at_zero(const T* w, int64_t np, double* out) {
  for (int64_t i = 0; i < np; ++i) out[i] = w[i] > T(0) ? 0.0 : -double(kInf);
}

template <class T>
static double largest_change(const T* w, const double* F, const double* old, int64_t n) {
  double top = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double change = F[i] > old[i] ? F[i] - old[i] : old[i] - F[i];
    if (w[i] > T(0) && change > top) top = change;
  }
  return top;
}

// ---------------------------------------------------------------- forward
template <class T>
struct Solver {
  Problem<T>& p;
  T lam_a, lam_b, low, high;
  bool sums_ready = false;  // columns_first: p.sums = K^T u for the current u

  void allow(T drift) {
    low = vexp<T>(splat<T>(-drift))[0];
    high = vexp<T>(splat<T>(drift))[0];
    sums_ready = false;
  }

  bool rows(bool with_sums) {
    int drifted = 0;
    dot_then_add(
        p, p.v,
        [&](int64_t first, int64_t end) {
          if (!half_step(lam_a, p.a, p.log_a, p.Fr, p.s, low, high, p.u, p.F, first, end)) __atomic_store_n(&drifted, 1, __ATOMIC_RELAXED);
        },
        p.u, with_sums);
    return !drifted;
  }
  bool columns() { return half_step(lam_b, p.b, p.log_b, p.Gr, p.sums, low, high, p.v, p.G, 0, p.mp); }

  // One iteration with products only; false: to be done again with exponentials.
  bool plain(bool last) {
    if (p.call->rows_first) return rows(true) && columns();
    if (!sums_ready) add_only(p, p.u);
    if (!columns() || !rows(!last)) return false;
    sums_ready = true;
    return true;
  }

  void with_exponentials() {
    if (p.call->rows_first) {
      log_sums_of_rows(p, p.G_old, p.F);
      log_half_step(lam_a, p.a, p.log_a, p.np, p.F);
      log_sums_of_columns(p, p.F, p.G);
      log_half_step(lam_b, p.b, p.log_b, p.mp, p.G);
    } else {
      log_sums_of_columns(p, p.F_old, p.G);
      log_half_step(lam_b, p.b, p.log_b, p.mp, p.G);
      log_sums_of_rows(p, p.G, p.F);
      log_half_step(lam_a, p.a, p.log_a, p.np, p.F);
    }
    refer(p.F, p.a, p.np, p.Fr, p.u);
    refer(p.G, p.b, p.mp, p.Gr, p.v);
    build_kernel(p);
    allow(Limits<T>::drift);
  }
};

template <class T>
static void write_plan(const Problem<T>& p) {
  const SinkhornCall& call = *p.call;
  T* plan = static_cast<T*>(call.plan);
  over_blocks(p, [&](int64_t, int64_t begin, int64_t end) {
    alignas(64) T staged[kStage];
    for (int64_t i = begin; i < end; ++i) {
      const T* row = p.K + i * p.mp;
      Vec<T> value = splat<T>(0);
      over_row(p, i, T(0), [&](int64_t j, const T* cost, int64_t count) {
        T* out = plan ? plan + (p.index * p.n + i) * p.m + j : staged;
        const bool direct = plan && j + count <= p.m;
        for (int64_t c = 0; c < count; c += kWidth<T>) {
          const Vec<T> mass = load(row + j + c) * load(p.v + j + c) * p.u[i], x = load(cost + c);
          value += mass * (x < T(kInf) ? x : splat<T>(0));
          store((direct ? out : staged) + c, mass);
        }
        if (plan && !direct) std::memcpy(out, staged, std::size_t(p.m - j) * sizeof(T));
      });
      p.row_values[i] = sum_lanes_double<T>(value);
    }
  });
  if (call.value) {
    double total = 0;
    for (int64_t i = 0; i < p.n; ++i) total += p.row_values[i];
    static_cast<T*>(call.value)[p.index] = T(total);
  }
}

template <class T>
static void solve(Problem<T>& p) {
  const SinkhornCall& call = *p.call;
  const T top = examine(p);
  Solver<T> solver{p, T(call.lam_a), T(call.lam_b), T(0), T(0)};
  start_at_zero(p.a, p.np, p.F);  // the start: f = g = 0
  start_at_zero(p.b, p.mp, p.G);
  bool plain = double(top) / call.epsilon <= double(Limits<T>::plain);
  if (plain) {
    refer(p.F, p.a, p.np, p.Fr, p.u);
    refer(p.G, p.b, p.mp, p.Gr, p.v);
    build_kernel(p);
    solver.allow(Limits<T>::plain);
  }
  int64_t done = 0;
  while (done < call.iters) {
    swap(p.F, p.F_old);
    swap(p.G, p.G_old);
    if (!plain || !solver.plain(done + 1 == call.iters)) solver.with_exponentials();
    plain = true;
    if (call.saved) {
      double* saved = call.saved + (p.index * call.iters + done) * (p.n + p.m);
      std::memcpy(saved, p.F, std::size_t(p.n) * sizeof(double));
      std::memcpy(saved + p.n, p.G, std::size_t(p.m) * sizeof(double));
    }
    ++done;
    if (call.tol >= 0) {
      const double change = call.rows_first ? largest_change(p.a, p.F, p.F_old, p.n) : largest_change(p.b, p.G, p.G_old, p.m);
      if (change <= call.tol) break;
    }
  }
  if (call.iterations) call.iterations[p.index] = done;
  for (int64_t i = 0; call.f && i < p.n; ++i) static_cast<T*>(call.f)[p.index * p.n + i] = T(p.F[i] * call.epsilon);
  for (int64_t j = 0; call.g && j < p.m; ++j) static_cast<T*>(call.g)[p.index * p.m + j] = T(p.G[j] * call.epsilon);
  if (call.plan || call.value) write_plan(p);
}

// ---------------------------------------------------------------- all problems
template <class T>
static std::size_t lay_out(Arena& arena, const SinkhornCall& call, bool backward, Problem<T>& p, Reverse<T>& r) {
  take_problem(arena, call, p);
  if (backward) take_reverse(arena, call, r);
  return arena.used;
}

template <class T>
static std::size_t bytes_needed(const SinkhornCall& call, bool backward) {
  Arena counter{nullptr};
  Problem<T> p{};
  Reverse<T> r{p, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  return lay_out(counter, call, backward, p, r);
}

template <class T>
static void run_problems(const SinkhornCall& call, bool backward) {
  const auto some = [&](void* memory, int64_t begin, int64_t end) {
    Arena arena{static_cast<char*>(memory)};
    Problem<T> p{};
    Reverse<T> r{p, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    lay_out(arena, call, backward, p, r);
    for (int64_t index = begin; index < end; ++index) {
      p.index = index;
      if (backward) {
        reverse(p, r);
      } else {
        solve(p);
      }
    }
  };
  if (!sinkhorn_small(call)) return some(call.workspace, 0, call.batch);
  const std::size_t bytes = bytes_needed<T>(call, backward);
  const int64_t work = call.n * call.m * (call.iters + 8);  // a range is worth a thread from about 10 us on
  if constexpr (sizeof(T) == 4) {
    if (lanes_fit(call)) {
      Arena counter{nullptr};
      Group sizes;
      take_group(counter, call, backward, sizes);
      const int64_t groups = call.batch / kLanes, whole = groups * kLanes;
      return parallel_for(groups + (whole < call.batch), 1 + 40000 / work, [&](int64_t begin, int64_t end) {
        void* memory = thread_scratch(0, bytes);
        Arena arena{static_cast<char*>(thread_scratch(1, counter.used))};
        Group group;
        take_group(arena, call, backward, group);
        for (int64_t index = begin; index < end; ++index) {
          group.first = index * kLanes;
          if (index == groups) {
            some(memory, whole, call.batch);
          } else if (!backward) {
            if (!solve_group(group)) some(memory, group.first, group.first + kLanes);
          } else if (was_solved_in_lanes(group)) {
            reverse_group(group);
          } else {
            some(memory, group.first, group.first + kLanes);
          }
        }
      });
    }
  }
  parallel_for(call.batch, 1 + 200000 / work, [&](int64_t begin, int64_t end) { some(thread_scratch(0, bytes), begin, end); });
}

}  // namespace

std::size_t sinkhorn_workspace(const SinkhornCall& call, bool backward) {
  if (sinkhorn_small(call)) return 0;
  return call.f64 ? bytes_needed<double>(call, backward) : bytes_needed<float>(call, backward);
}

void sinkhorn_forward(const SinkhornCall& call) { call.f64 ? run_problems<double>(call, false) : run_problems<float>(call, false); }
void sinkhorn_backward(const SinkhornCall& call) { call.f64 ? run_problems<double>(call, true) : run_problems<float>(call, true); }

}  // namespace KD_ISA
}  // namespace kdfast

// Problems that fit one block's shared memory: a team of threads owns a problem for all its iterations, so the cost is read once
// and nothing goes back to memory in between. Up to 32 x 32 a team is 4 to 32 lanes of a warp (a warp solves up to 8 problems, and
// a barrier is a __syncwarp); beyond, a block.
//
// A point belongs to `split` neighbouring lanes, which share the walk along its row or column and add up by shuffles: a row's
// half-step is a walk along i, a column's one along j, with nothing to reduce across the team. Rows of the cost lie an odd number of
// floats apart, so 32 lanes on 32 rows hit 32 banks.
#include "cuda/sinkhorn.h"

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/sinkhorn.cuh"

namespace kdfast {
namespace cuda {

namespace {

using namespace sinkhorn;

constexpr int kBlock = 128;  // threads of a block of small teams

struct Shape {
  int team, split, teams;  // threads of a team, lanes of a point, teams of a block
  int pitch;               // floats from a row to the next
  int bytes;               // shared memory of a team
};

int power_above(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

Shape shape_of(int64_t n, int64_t m, bool backward) {
  Shape shape;
  const int points = std::max(4, power_above(std::max(n, m)));
  shape.split = points <= 32 ? 1 : std::min(4, std::max(1, 512 / points));
  shape.team = points * shape.split;
  shape.teams = shape.team <= 32 ? kBlock / shape.team : 1;
  shape.pitch = int(m) | 1;
  const int64_t bytes = (backward ? 2 : 1) * n * shape.pitch * 4 + (n + m) * (backward ? 12 : 8);
  shape.bytes = int((bytes + 15) / 16 * 16);
  return shape;
}

// What a team keeps in shared memory.
struct Memory {
  float* cost;    // [n, pitch]
  float* extra;   // [n, pitch], backward: the gradient so far
  Pair *f, *g;    // [n], [m]
  float *df, *dg;  // [n], [m], backward

  __device__ Memory(unsigned char* base, int n, int m, int pitch, bool backward) {
    f = reinterpret_cast<Pair*>(base);
    g = f + n;
    cost = reinterpret_cast<float*>(g + m);
    extra = cost + n * pitch;
    df = extra + (backward ? n * pitch : 0);
    dg = df + n;
  }
};

// A walk along the row (or column) of one point: entries lie `step` apart from `cost`, partners' potentials from `other`.
struct Walk {
  const float* cost;
  int step, count;
  const Pair* other;
};

template <bool lanes>
__device__ Pair new_potential(const Team<lanes>& team, const Walk& w, float scale, Pair old, double lam, float weight) {
  const int part = team.me % team.split;
  float top = -kInfinity, sum = 0;
  for (int k = part; k < w.count; k += team.split) top = larger(plan_exponent(w.cost[k * w.step], scale, old, w.other[k]), top);
  top = team.point(top, Larger());
  for (int k = part; k < w.count && top != -kInfinity; k += team.split) sum += expf(plan_exponent(w.cost[k * w.step], scale, old, w.other[k]) - top);
  return half_step(lam, weight, top, team.point(sum, Plus()), old);
}

}  // namespace

template <bool lanes>
__global__ void __launch_bounds__(lanes ? kBlock : 1024) sinkhorn_small_forward_kernel(const __grid_constant__ SinkhornCall call, int size, int split, int bytes, int pitch) {
  KD_DYNAMIC_SHARED(memory);
  __shared__ double scratch[32];
  const Team<lanes> team{size, split, int(threadIdx.x) % size, scratch};
  const int which = int(threadIdx.x) / size, point = team.me / split;
  const int64_t problem = int64_t(blockIdx.x) * (blockDim.x / size) + which;
  const bool exists = problem < call.batch;  // the warp's last teams may have none; they keep up with its barriers
  const int n = exists ? int(call.n) : 0, m = exists ? int(call.m) : 0;
  const Memory s(memory + which * bytes, int(call.n), int(call.m), pitch, false);
  const float scale = float(-1 / call.epsilon);
  for (int i = 0; i < n; ++i) {  // the team reads a row at a time: side by side where the cost is
    const int64_t row = row_start(call.rows, call.cost, problem * call.n + i);
    for (int j = team.me; j < m; j += size) s.cost[i * pitch + j] = load_value(call.cost.data, call.cost.dtype, row + j * call.cost.class_stride);
  }
  const bool row = point < n, column = point < m;
  const float a = row ? weight_of(call.a, problem * call.n + point) : 1, b = column ? weight_of(call.b, problem * call.m + point) : 1;
  const bool writes = team.me % split == 0;
  if (row && writes) s.f[point] = start_of(a);
  if (column && writes) s.g[point] = start_of(b);
  team.sync();

  const Walk along_row{s.cost + (row ? point : 0) * pitch, 1, row ? m : 0, s.g};
  const Walk along_column{s.cost + (column ? point : 0), pitch, column ? n : 0, s.f};
  // Half-steps end with a barrier: the other side reads what this one wrote.
  const auto rows = [&](bool active) {
    const Pair old = row ? s.f[point] : Pair{0, 0}, now = new_potential(team, along_row, scale, old, call.lam_a, a);
    if (row && writes && active) s.f[point] = now;
    team.sync();
    return row ? moved(old, now) : 0.0f;
  };
  const auto columns = [&](bool active) {
    const Pair old = column ? s.g[point] : Pair{0, 0}, now = new_potential(team, along_column, scale, old, call.lam_b, b);
    if (column && writes && active) s.g[point] = now;
    team.sync();
    return column ? moved(old, now) : 0.0f;
  };
  bool active = exists;
  int64_t done = 0;
  for (int64_t k = 1; k <= call.iters; ++k) {
    float change;
    if (call.rows_first) {
      change = rows(active);
      columns(active);
    } else {
      change = columns(active);
      rows(active);
    }
    if (active) {
      ++done;
      if (row && writes) save_pair(call, problem, k, point, s.f[point]);
      if (column && writes) save_pair(call, problem, k, n + point, s.g[point]);
    }
    if (call.tol >= 0) {
      if (team.all(change, Larger()) <= float(call.tol)) active = false;
      if (lanes ? !__any_sync(kAll, active) : !active) break;  // the same for the whole warp, or block
    }
  }
  if (exists && team.me == 0 && call.iterations) call.iterations[problem] = done;
  if (row && writes && call.f) static_cast<float*>(call.f)[problem * call.n + point] = float(s.f[point].value() * call.epsilon);
  if (column && writes && call.g) static_cast<float*>(call.g)[problem * call.m + point] = float(s.g[point].value() * call.epsilon);
  if (!call.plan && !call.value) return;
  double value = 0;
  for (int i = 0; i < n; ++i) {
    for (int j = team.me; j < m; j += size) {
      const float cost = s.cost[i * pitch + j], mass = expf(plan_exponent(cost, scale, s.f[i], s.g[j]));
      if (call.plan) static_cast<float*>(call.plan)[(problem * call.n + i) * call.m + j] = mass;
      value += double(mass * (cost < kInfinity ? cost : 0));
    }
  }
  if (!call.value) return;
  value = team.all(value, Plus());
  if (exists && team.me == 0) static_cast<float*>(call.value)[problem] = float(value);
}

// Equations (4) to (6). The thread of a row adds the row's terms to the gradient in shared memory, the thread of a column the
// column's; a barrier between.
template <bool lanes>
__global__ void __launch_bounds__(lanes ? kBlock : 1024) sinkhorn_small_backward_kernel(const __grid_constant__ SinkhornCall call, int size, int split, int bytes, int pitch) {
  KD_DYNAMIC_SHARED(memory);
  __shared__ double scratch[32];
  const Team<lanes> team{size, split, int(threadIdx.x) % size, scratch};
  const int which = int(threadIdx.x) / size, point = team.me / split, part = team.me % split;
  const int64_t problem = int64_t(blockIdx.x) * (blockDim.x / size) + which;
  const bool exists = problem < call.batch;
  const int n = exists ? int(call.n) : 0, m = exists ? int(call.m) : 0;
  const Memory s(memory + which * bytes, int(call.n), int(call.m), pitch, true);
  const float scale = float(-1 / call.epsilon), inverse = float(1 / call.epsilon);
  const float gv = exists && call.grad_value ? static_cast<const float*>(call.grad_value)[problem] : 0;
  const int64_t done = exists ? call.iterations[problem] : 0;
  const bool row = point < n, column = point < m, writes = part == 0;
  const float a = row ? weight_of(call.a, problem * call.n + point) : 1, b = column ? weight_of(call.b, problem * call.m + point) : 1;
  const Pair last_f = row ? saved_pair(call, problem, done, point, false) : Pair{0, 0};
  const Pair last_g = column ? saved_pair(call, problem, done, n + point, false) : Pair{0, 0};
  if (row && writes) s.f[point] = last_f;
  if (column && writes) s.g[point] = last_g;
  team.sync();
  for (int i = 0; i < n; ++i) {
    const int64_t start = row_start(call.rows, call.cost, problem * call.n + i);
    for (int j = team.me; j < m; j += size) {
      const float cost = load_value(call.cost.data, call.cost.dtype, start + j * call.cost.class_stride);
      const float mass = expf(plan_exponent(cost, scale, s.f[i], s.g[j]));
      s.cost[i * pitch + j] = cost;
      s.extra[i * pitch + j] = call.envelope ? gv * mass : mass;
    }
  }
  team.sync();
  if (!call.envelope) {
    // the start: df = A 1, dg = A^T 1 from A = P dP, and the gradient's direct part gv P - A / epsilon
    float df = 0, dg = 0;
    for (int j = part; j < (row ? m : 0); j += split) df += s.extra[point * pitch + j] * upstream(call, problem, point, j, s.cost[point * pitch + j], gv);
    for (int i = part; i < (column ? n : 0); i += split) dg += s.extra[i * pitch + point] * upstream(call, problem, i, point, s.cost[i * pitch + point], gv);
    df = team.point(df, Plus());
    dg = team.point(dg, Plus());
    team.sync();  // everybody has read the plan
    for (int j = part; j < (row ? m : 0); j += split) {
      float& entry = s.extra[point * pitch + j];
      entry *= gv - upstream(call, problem, point, j, s.cost[point * pitch + j], gv) * inverse;
    }
    if (row && call.grad_f && !last_f.dead()) df += float(call.epsilon) * static_cast<const float*>(call.grad_f)[problem * call.n + point];
    if (column && call.grad_g && !last_g.dead()) dg += float(call.epsilon) * static_cast<const float*>(call.grad_g)[problem * call.m + point];
    if (column && writes) s.dg[point] = dg;
    team.sync();

    const float lam_a = float(call.lam_a), lam_b = float(call.lam_b);
    double sum_f = 0, sum_g = 0;
    // (5), walked along rows: dC += lam_b c dg, df -= lam_b sum_j c dg. Reads g (as the half-step's weights), f and dg.
    const auto reverse_columns = [&](Pair f) {
      float sum = 0;
      for (int j = part; j < (row ? m : 0); j += split) {
        const float term = lam_b * expf(plan_exponent(s.cost[point * pitch + j], scale, f, s.g[j])) * s.dg[j];
        s.extra[point * pitch + j] += term * inverse;
        sum += term;
      }
      df -= team.point(sum, Plus());
    };
    // (4), walked along columns: dC += lam_a w df, dg = -lam_a sum_i w df.
    const auto reverse_rows = [&](Pair g) {
      float sum = 0;
      for (int i = part; i < (column ? n : 0); i += split) {
        const float term = lam_a * expf(plan_exponent(s.cost[i * pitch + point], scale, s.f[i], g)) * s.df[i];
        s.extra[i * pitch + point] += term * inverse;
        sum += term;
      }
      return -team.point(sum, Plus());
    };
    // Teams of a warp may have stopped at different iterations: all walk to the last one's number, a finished one with df = dg = 0.
    int64_t rounds = done;
    if (lanes) {
      for (int step = 16; step; step /= 2) {
        const int64_t other = __shfl_xor_sync(kAll, rounds, step);
        rounds = other > rounds ? other : rounds;
      }
    }
    const auto of_row = [&](int64_t k) { return row ? saved_pair(call, problem, k, point, last_f.dead()) : Pair{0, 0}; };
    const auto of_column = [&](int64_t k) { return column ? saved_pair(call, problem, k, n + point, last_g.dead()) : Pair{0, 0}; };
    for (int64_t k = rounds; k >= 1; --k) {
      const bool mine = k <= done;
      const int64_t at = mine ? k : done;
      if (call.rows_first) {
        const Pair f = of_row(at);
        if (column && writes) {
          s.g[point] = weights_potential(of_column(at), call.lam_b, b);
          if (!mine) s.dg[point] = 0;
        }
        team.sync();
        if (mine) sum_g += dg;
        const float keep_f = df, keep_g = dg;
        reverse_columns(f);
        if (!mine) df = keep_f;
        team.sync();  // dg and g have been read
        if (row && writes) {
          s.df[point] = mine ? df : 0;
          s.f[point] = weights_potential(f, call.lam_a, a);
        }
        if (mine) sum_f += df;
        team.sync();
        const float back = reverse_rows(of_column(at - 1));
        dg = mine ? back : keep_g;
        df = mine ? 0 : df;
        if (column && writes) s.dg[point] = dg;
        team.sync();
      } else {
        if (row && writes) {
          s.df[point] = mine ? df : 0;
          s.f[point] = weights_potential(of_row(at), call.lam_a, a);
        }
        team.sync();
        if (mine) sum_f += df;
        const float back = reverse_rows(of_column(at));
        if (mine) dg += back, df = 0;
        team.sync();  // df and f have been read
        if (column && writes) {
          s.dg[point] = mine ? dg : 0;
          s.g[point] = weights_potential(of_column(at), call.lam_b, b);
        }
        if (mine) sum_g += dg;
        team.sync();
        const float keep = df;
        reverse_columns(of_row(at - 1));
        if (mine) {
          dg = 0;
        } else {
          df = keep;
        }
        team.sync();
      }
    }
    if (row && writes && call.grad_a) static_cast<float*>(call.grad_a)[problem * call.n + point] = last_f.dead() ? 0 : float(call.lam_a * sum_f / a);
    if (column && writes && call.grad_b) static_cast<float*>(call.grad_b)[problem * call.m + point] = last_g.dead() ? 0 : float(call.lam_b * sum_g / b);
  }
  team.sync();
  for (int i = 0; i < n; ++i) {
    const int64_t start = row_start(call.rows, call.grad_cost, problem * call.n + i);
    for (int j = team.me; j < m; j += size) store_value(call.grad_cost.data, call.grad_cost.dtype, start + j * call.grad_cost.class_stride, s.extra[i * pitch + j]);
  }
}

template <class Kernel>
static void go(const char* name, Kernel* in_warps, Kernel* in_blocks, const SinkhornCall& call, bool backward, cudaStream_t stream) {
  const Shape shape = shape_of(call.n, call.m, backward);
  const bool lanes = shape.team <= 32;
  Kernel* kernel = lanes ? in_warps : in_blocks;
  const std::size_t shared = std::size_t(shape.bytes) * shape.teams;
  if (shared > 40 << 10) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), name);
  launch(name, kernel, (call.batch + shape.teams - 1) / shape.teams, unsigned(shape.team * shape.teams), shared, stream, 1, call, shape.team,
         shape.split, shape.bytes, shape.pitch);
}

static bool fits(int64_t n, int64_t m, bool backward) {
  if (n > 1024 || m > 1024) return false;
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  const Shape shape = shape_of(n, m, backward);
  return int64_t(shape.bytes) * shape.teams + 1024 <= bytes;  // 1024: the kernels' scratch
}

void sinkhorn_forward(const SinkhornCall& call, cudaStream_t stream) {
  if (!fits(call.n, call.m, false)) return sinkhorn_grid_forward(call, stream);
  go("sinkhorn_small_forward_kernel", sinkhorn_small_forward_kernel<true>, sinkhorn_small_forward_kernel<false>, call, false, stream);
}

void sinkhorn_backward(const SinkhornCall& call, cudaStream_t stream) {
  if (!fits(call.n, call.m, true)) return sinkhorn_grid_backward(call, stream);
  go("sinkhorn_small_backward_kernel", sinkhorn_small_backward_kernel<true>, sinkhorn_small_backward_kernel<false>, call, true, stream);
}

std::size_t sinkhorn_workspace(int64_t n, int64_t m, bool backward) { return fits(n, m, backward) ? 0 : sinkhorn_grid_workspace(n, m, backward); }

}  // namespace cuda
}  // namespace kdfast

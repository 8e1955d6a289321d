// Problems too large for one block's shared memory: the whole GPU works on one at a time, in one launch with grid barriers; costs of
// up to some 24 MB stay in L2 over all iterations.
//
// A block owns a run of rows. Its warps take a row each for the rows' half-step; with the new potentials of its own rows its threads
// then take a column each and leave (largest exponent, sum) of the block's rows. After a barrier the columns are dealt to all threads of
// the grid, which put the blocks' parts together in block order; after a second one everybody reads the new potentials. So an iteration
// is two reads of the cost and two barriers, and its bits depend on nothing but the number of blocks.
#include <cooperative_groups.h>

#include "cuda/sinkhorn.cuh"
#include "cuda/sinkhorn.h"
#include "cuda/together.h"

namespace kdfast {
namespace cuda {

// Parameters of kernels stand outside the unnamed namespace, which would put a random tag into the kernels' names.
struct SinkhornPart {  // of a column's log-sum-exp: the largest exponent, the sum relative to it. Backward: sum alone
  float top, sum;
};

// Of one problem at a time.
struct SinkhornSpace {
  sinkhorn::Pair *f, *g;  // [n], [m] now; backward: of the iteration's rows and of the columns they read
  sinkhorn::Pair* g_weights;  // [m] weights_potential of g, backward
  SinkhornPart* parts;          // [blocks, m]
  double *values;       // [blocks]
  double *sum_f, *sum_g;  // [n], [m] backward
  float *changes;       // [blocks]
  float *df, *dg;       // [n], [m] backward
  float* extra;         // [n, m] backward: the gradient so far
};

namespace {

using namespace sinkhorn;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kMostBlocks = 256;

template <class Count>
SinkhornSpace lay_out(Count take, int64_t n, int64_t m, bool backward) {
  SinkhornSpace s{};
  const int64_t more = backward ? 1 : 0;
  s.f = static_cast<Pair*>(take(n * sizeof(Pair)));
  s.g = static_cast<Pair*>(take(m * sizeof(Pair)));
  s.parts = static_cast<SinkhornPart*>(take(kMostBlocks * m * sizeof(SinkhornPart)));
  s.values = static_cast<double*>(take(kMostBlocks * 8));
  s.changes = static_cast<float*>(take(kMostBlocks * 4));
  s.g_weights = static_cast<Pair*>(take(more * m * sizeof(Pair)));
  s.sum_f = static_cast<double*>(take(more * n * 8));
  s.sum_g = static_cast<double*>(take(more * m * 8));
  s.df = static_cast<float*>(take(more * n * 4));
  s.dg = static_cast<float*>(take(more * m * 4));
  s.extra = static_cast<float*>(take(more * n * m * 4));
  return s;
}

struct Take {  // hands out parts of a buffer; of a null one it only counts
  unsigned char* base;
  std::size_t used;
  void* operator()(std::size_t bytes) {
    void* at = base + used;
    used += (bytes + 127) / 128 * 128;
    return at;
  }
};

// What every part of a kernel needs to know of its place.
struct Place {
  const SinkhornCall& call;
  const SinkhornSpace& s;
  int64_t problem, begin, end;  // its block's rows
  float scale;

  __device__ Place(const SinkhornCall& call, const SinkhornSpace& s, int64_t problem) : call(call), s(s), problem(problem) {
    const int64_t run = (call.n + gridDim.x - 1) / gridDim.x;
    begin = min(call.n, run * blockIdx.x);
    end = min(call.n, begin + run);
    scale = float(-1 / call.epsilon);
  }
  __device__ int64_t row(int64_t i) const { return row_start(call.rows, call.cost, problem * call.n + i); }
  __device__ float cost(int64_t row, int64_t j) const { return load_value(call.cost.data, call.cost.dtype, row + j * call.cost.class_stride); }
  __device__ float a(int64_t i) const { return weight_of(call.a, problem * call.n + i); }
  __device__ float b(int64_t j) const { return weight_of(call.b, problem * call.m + j); }
  __device__ Pair saved_f(int64_t k, int64_t i, bool dead) const { return saved_pair(call, problem, k, i, dead); }
  __device__ Pair saved_g(int64_t k, int64_t j, bool dead) const { return saved_pair(call, problem, k, call.n + j, dead); }
  // Each warp of the block a row, each thread of the block a column, each thread of the grid a column.
  template <class F>
  __device__ void each_row(F f) const {
    for (int64_t i = begin + threadIdx.x / 32; i < end; i += kWarps) f(i, row(i), int(threadIdx.x % 32));
  }
  template <class F>
  __device__ void each_column(F f) const {
    for (int64_t j = threadIdx.x; j < call.m; j += kThreads) f(j);
  }
  template <class F>
  __device__ void each_own_column(F f) const {
    for (int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x; j < call.m; j += int64_t(gridDim.x) * kThreads) f(j);
  }
};

template <class F>
__device__ __forceinline__ float warp_all(float x, F f) {
#pragma unroll
  for (int step = 16; step; step /= 2) x = f(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

// The rows' half-step of the block's rows; the thread's largest change.
__device__ float rows_step(const Place& p, int64_t k) {
  float change = 0;
  p.each_row([&](int64_t i, int64_t row, int lane) {
    const Pair old = p.s.f[i];
    float top = -kInfinity, sum = 0;
    for (int64_t j = lane; j < p.call.m; j += 32) top = larger(plan_exponent(p.cost(row, j), p.scale, old, p.s.g[j]), top);
    top = warp_all(top, Larger());
    if (top != -kInfinity) {
      for (int64_t j = lane; j < p.call.m; j += 32) sum += expf(plan_exponent(p.cost(row, j), p.scale, old, p.s.g[j]) - top);
    }
    const Pair now = half_step(p.call.lam_a, p.a(i), top, warp_all(sum, Plus()), old);
    change = larger(moved(old, now), change);
    if (lane == 0) {
      p.s.f[i] = now;
      save_pair(p.call, p.problem, k, i, now);
    }
  });
  __syncthreads();  // the columns read the block's potentials
  return change;
}

// The block's part of the columns' half-step.
__device__ void columns_part(const Place& p) {
  p.each_column([&](int64_t j) {
    const Pair old = p.s.g[j];
    float top = -kInfinity, sum = 0;
    for (int64_t i = p.begin; i < p.end; ++i) top = larger(plan_exponent(p.cost(p.row(i), j), p.scale, p.s.f[i], old), top);
    if (top != -kInfinity) {
      for (int64_t i = p.begin; i < p.end; ++i) sum += expf(plan_exponent(p.cost(p.row(i), j), p.scale, p.s.f[i], old) - top);
    }
    p.s.parts[int64_t(blockIdx.x) * p.call.m + j] = {top, sum};
  });
}

// The parts put together; the thread's largest change.
__device__ float columns_step(const Place& p, int64_t k) {
  float change = 0;
  p.each_own_column([&](int64_t j) {
    float top = -kInfinity, sum = 0;
    for (int64_t block = 0; block < gridDim.x; ++block) top = larger(p.s.parts[block * p.call.m + j].top, top);
    for (int64_t block = 0; block < gridDim.x && top != -kInfinity; ++block) {
      const SinkhornPart part = p.s.parts[block * p.call.m + j];
      if (part.top != -kInfinity) sum += part.sum * expf(part.top - top);
    }
    const Pair old = p.s.g[j], now = half_step(p.call.lam_b, p.b(j), top, sum, old);
    change = larger(moved(old, now), change);
    p.s.g[j] = now;
    save_pair(p.call, p.problem, k, p.call.n + j, now);
  });
  return change;
}

}  // namespace

__global__ void __launch_bounds__(kThreads, 2) sinkhorn_grid_forward_kernel(const __grid_constant__ SinkhornCall call, const __grid_constant__ SinkhornSpace s) {
  __shared__ double scratch[32];
  const auto grid = cooperative_groups::this_grid();
  const Team<false> team{kThreads, 1, int(threadIdx.x), scratch};
  const auto note = [&](float change) {
    change = team.all(change, Larger());
    if (threadIdx.x == 0) s.changes[blockIdx.x] = change;
  };
  const auto stops = [&] {  // the same in every thread of the grid
    float change = 0;
    for (int block = 0; block < int(gridDim.x); ++block) change = larger(s.changes[block], change);
    return change <= float(call.tol);
  };
  const bool test = call.tol >= 0;
  for (int64_t problem = 0; problem < call.batch; ++problem) {
    const Place p(call, s, problem);
    for (int64_t i = p.begin + threadIdx.x; i < p.end; i += kThreads) s.f[i] = start_of(p.a(i));
    p.each_own_column([&](int64_t j) { s.g[j] = start_of(p.b(j)); });
    grid.sync();
    int64_t done = 0;
    for (bool stop = false; !stop && done < call.iters;) {
      ++done;
      if (call.rows_first) {
        const float change = rows_step(p, done);
        if (test) note(change);
        columns_part(p);
        grid.sync();  // the parts are there
        columns_step(p, done);
        stop = test && stops();  // before the barrier: after it the changes are written again
        grid.sync();  // the new g is there
      } else {
        columns_part(p);
        grid.sync();
        const float change = columns_step(p, done);
        if (test) note(change);
        grid.sync();
        rows_step(p, done);
        stop = test && stops();  // written again after the next barrier
      }
    }
    if (call.iterations && blockIdx.x == 0 && threadIdx.x == 0) call.iterations[problem] = done;
    for (int64_t i = p.begin + threadIdx.x; call.f && i < p.end; i += kThreads) {
      static_cast<float*>(call.f)[problem * call.n + i] = float(s.f[i].value() * call.epsilon);
    }
    if (call.g) p.each_own_column([&](int64_t j) { static_cast<float*>(call.g)[problem * call.m + j] = float(s.g[j].value() * call.epsilon); });
    double value = 0;
    if (call.plan || call.value) {
      p.each_row([&](int64_t i, int64_t row, int lane) {
        for (int64_t j = lane; j < call.m; j += 32) {
          const float cost = p.cost(row, j), mass = expf(plan_exponent(cost, p.scale, s.f[i], s.g[j]));
          if (call.plan) static_cast<float*>(call.plan)[(problem * call.n + i) * call.m + j] = mass;
          value += double(mass * (cost < kInfinity ? cost : 0));
        }
      });
    }
    value = team.all(value, Plus());
    if (threadIdx.x == 0) s.values[blockIdx.x] = value;
    grid.sync();  // the values are there, and f and g may be overwritten
    if (call.value && blockIdx.x == 0 && threadIdx.x == 0) {
      double total = 0;
      for (int block = 0; block < int(gridDim.x); ++block) total += s.values[block];
      static_cast<float*>(call.value)[problem] = float(total);
    }
  }
}

// Equations (4) to (6): (5) along the block's rows, (4) along its part of every column, with the same barriers as the forward.
__global__ void __launch_bounds__(kThreads, 2) sinkhorn_grid_backward_kernel(const __grid_constant__ SinkhornCall call, const __grid_constant__ SinkhornSpace s) {
  const auto grid = cooperative_groups::this_grid();
  const float inverse = float(1 / call.epsilon), lam_a = float(call.lam_a), lam_b = float(call.lam_b);
  for (int64_t problem = 0; problem < call.batch; ++problem) {
    const Place p(call, s, problem);
    const int64_t done = call.iterations[problem];
    const float gv = call.grad_value ? static_cast<const float*>(call.grad_value)[problem] : 0;
    const auto dead_row = [&](int64_t i) { return p.saved_f(done, i, false).dead(); };
    const auto dead_column = [&](int64_t j) { return p.saved_g(done, j, false).dead(); };
    const auto write = [&](int64_t i, int64_t j, float gradient) {
      const int64_t at = row_start(call.rows, call.grad_cost, problem * call.n + i) + j * call.grad_cost.class_stride;
      store_value(call.grad_cost.data, call.grad_cost.dtype, at, gradient);
    };
    for (int64_t i = p.begin + threadIdx.x; i < p.end; i += kThreads) s.f[i] = p.saved_f(done, i, false), s.sum_f[i] = 0;
    p.each_own_column([&](int64_t j) { s.g[j] = p.saved_g(done, j, false), s.sum_g[j] = 0; });
    grid.sync();
    // the start: df = A 1, dg = A^T 1 from A = P dP, and the gradient's direct part
    p.each_row([&](int64_t i, int64_t row, int lane) {
      float sum = 0;
      for (int64_t j = lane; j < call.m; j += 32) {
        const float cost = p.cost(row, j), mass = expf(plan_exponent(cost, p.scale, s.f[i], s.g[j]));
        if (call.envelope) {
          write(i, j, gv * mass);
          continue;
        }
        const float up = upstream(call, problem, i, j, cost, gv);
        sum += mass * up;
        s.extra[i * call.m + j] = mass * (gv - up * inverse);
      }
      sum = warp_all(sum, Plus());
      if (lane == 0) s.df[i] = sum + (call.grad_f && !s.f[i].dead() ? float(call.epsilon) * static_cast<const float*>(call.grad_f)[problem * call.n + i] : 0);
    });
    if (call.envelope) {
      grid.sync();
      continue;
    }
    p.each_column([&](int64_t j) {
      float sum = 0;
      for (int64_t i = p.begin; i < p.end; ++i) {
        const float cost = p.cost(p.row(i), j);
        sum += expf(plan_exponent(cost, p.scale, s.f[i], s.g[j])) * upstream(call, problem, i, j, cost, gv);
      }
      s.parts[int64_t(blockIdx.x) * call.m + j].sum = sum;
    });
    const auto total = [&](int64_t j) {
      float sum = 0;
      for (int64_t block = 0; block < gridDim.x; ++block) sum += s.parts[block * call.m + j].sum;
      return sum;
    };
    // What (5) reads of a column: its gradient and the half-step's softmax weights.
    const auto publish = [&](int64_t j, int64_t k, float dg) {
      s.dg[j] = dg;
      s.sum_g[j] += dg;
      s.g_weights[j] = weights_potential(p.saved_g(k, j, dead_column(j)), call.lam_b, p.b(j));
    };
    grid.sync();
    p.each_own_column([&](int64_t j) {
      float dg = total(j);
      if (call.grad_g && !s.g[j].dead()) dg += float(call.epsilon) * static_cast<const float*>(call.grad_g)[problem * call.m + j];
      if (call.rows_first) {
        publish(j, done, dg);
        s.g[j] = p.saved_g(done - 1, j, s.g[j].dead());
      } else {
        s.dg[j] = dg;  // the first half-step to reverse is the rows': it adds to this
      }
    });
    grid.sync();

    // (5) of the block's rows: dC += lam_b c dg, df -= lam_b sum_j c dg
    const auto reverse_columns = [&](int64_t f_of) {
      p.each_row([&](int64_t i, int64_t row, int lane) {
        const Pair f = p.saved_f(f_of, i, dead_row(i));
        float sum = 0;
        for (int64_t j = lane; j < call.m; j += 32) {
          const float term = lam_b * expf(plan_exponent(p.cost(row, j), p.scale, f, s.g_weights[j])) * s.dg[j];
          s.extra[i * call.m + j] += term * inverse;
          sum += term;
        }
        sum = warp_all(sum, Plus());
        if (lane == 0) s.df[i] -= sum;
      });
    };
    // (4): dC += lam_a w df, the block's part of lam_a sum_i w df; df = 0
    const auto reverse_rows = [&](int64_t k) {
      for (int64_t i = p.begin + threadIdx.x; i < p.end; i += kThreads) s.f[i] = weights_potential(p.saved_f(k, i, dead_row(i)), call.lam_a, p.a(i));
      __syncthreads();  // also: the warps have left df and the gradient
      p.each_column([&](int64_t j) {
        float sum = 0;
        for (int64_t i = p.begin; i < p.end; ++i) {
          const float term = lam_a * expf(plan_exponent(p.cost(p.row(i), j), p.scale, s.f[i], s.g[j])) * s.df[i];
          s.extra[i * call.m + j] += term * inverse;
          sum += term;
        }
        s.parts[int64_t(blockIdx.x) * call.m + j].sum = sum;
      });
      __syncthreads();
      for (int64_t i = p.begin + threadIdx.x; i < p.end; i += kThreads) s.sum_f[i] += s.df[i], s.df[i] = 0;
    };
    for (int64_t k = done; k >= 1; --k) {
      if (call.rows_first) reverse_columns(k);
      reverse_rows(k);
      grid.sync();  // the parts are there, and nobody reads g
      p.each_own_column([&](int64_t j) {
        const bool dead = dead_column(j);
        if (!call.rows_first) {
          publish(j, k, (k == done ? s.dg[j] : 0) - total(j));
          s.g[j] = p.saved_g(k - 1, j, dead);
        } else if (k > 1) {
          publish(j, k - 1, -total(j));
          s.g[j] = p.saved_g(k - 2, j, dead);
        }
      });
      grid.sync();
      if (!call.rows_first) reverse_columns(k - 1);
    }
    __syncthreads();
    for (int64_t i = p.begin; i < p.end; ++i) {
      for (int64_t j = threadIdx.x; j < call.m; j += kThreads) write(i, j, s.extra[i * call.m + j]);
    }
    for (int64_t i = p.begin + threadIdx.x; call.grad_a && i < p.end; i += kThreads) {
      static_cast<float*>(call.grad_a)[problem * call.n + i] = dead_row(i) ? 0 : float(call.lam_a * s.sum_f[i] / p.a(i));
    }
    if (call.grad_b) {
      p.each_own_column([&](int64_t j) {
        static_cast<float*>(call.grad_b)[problem * call.m + j] = dead_column(j) ? 0 : float(call.lam_b * s.sum_g[j] / p.b(j));
      });
    }
    grid.sync();  // the next problem's g may be written
  }
}

template <class Kernel>
static void go(const char* name, Kernel* kernel, const SinkhornCall& call, bool backward, cudaStream_t stream) {
  Take take{static_cast<unsigned char*>(call.workspace), 0};
  const SinkhornSpace space = lay_out([&](std::size_t bytes) { return take(bytes); }, call.n, call.m, backward);
  launch_together(name, kernel, std::min<int64_t>(kMostBlocks, (call.n + kWarps - 1) / kWarps), kThreads, 0, stream, call, space);
}

std::size_t sinkhorn_grid_workspace(int64_t n, int64_t m, bool backward) {
  Take take{nullptr, 0};
  lay_out([&](std::size_t bytes) { return take(bytes); }, n, m, backward);
  return take.used;
}

void sinkhorn_grid_forward(const SinkhornCall& call, cudaStream_t stream) { go("sinkhorn_grid_forward_kernel", sinkhorn_grid_forward_kernel, call, false, stream); }
void sinkhorn_grid_backward(const SinkhornCall& call, cudaStream_t stream) { go("sinkhorn_grid_backward_kernel", sinkhorn_grid_backward_kernel, call, true, stream); }

}  // namespace cuda
}  // namespace kdfast

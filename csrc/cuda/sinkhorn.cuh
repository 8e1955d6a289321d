// Device code that both Sinkhorn kernels share. Equations: kdfast/ops/sinkhorn.py, with scaled potentials F = f / epsilon.
//
// A potential is a pair of floats: at epsilon = 1e-3 it reaches 1000, where one float is good to 6e-5 and its exponential no
// better. Exponents are taken of whole plan entries, C / -epsilon + F_i + G_j, so they are small where they matter; a half-step
// then corrects the potential by the log of the sum it finds. A masked or isolated point is the pair (0, -inf), which makes
// every exponent it enters -inf without a branch.
#pragma once

#include "cpu/sinkhorn.h"
#include "cuda/device.h"
#include "cuda/values.h"
#include "sinkhorn_terms.h"

namespace kdfast {
namespace cuda {
namespace sinkhorn {

constexpr unsigned kAll = ~0u;
constexpr float kInfinity = __builtin_huge_valf();

struct __align__(8) Pair {
  float hi, lo;
  __device__ double value() const { return double(hi) + double(lo); }
  __device__ bool dead() const { return lo == -kInfinity; }
};

__device__ __forceinline__ Pair pair_of(double x) {
  if (x == -double(kInfinity)) return {0, -kInfinity};
  const float hi = float(x);
  return {hi, float(x - double(hi))};
}

__device__ __forceinline__ float plan_exponent(float cost, float scale, Pair f, Pair g) {
  return exponent(cost, scale, f.hi, g.hi) + (f.lo + g.lo);
}

// The larger; NaN if there is one, so that NaN in gives NaN out.
__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }

__device__ __forceinline__ float weight_of(const void* weights, int64_t at) { return weights ? static_cast<const float*>(weights)[at] : 1; }

// F before the first iteration: 0, dead where the weight is 0.
__device__ __forceinline__ Pair start_of(float weight) { return pair_of(weight == 0 ? -double(kInfinity) : 0); }

// F = lam (log w - L) from the largest exponent and the sum of exp(exponent - largest) of its row: L = largest + log sum - F_old.
__device__ __forceinline__ Pair half_step(double lam, float weight, float top, float sum, Pair old) {
  if (top == -kInfinity) return pair_of(-double(kInfinity));
  return pair_of(lam * (double(logf(weight)) - (double(top) + double(logf(sum)) - old.value())));
}

// How far it moved, for the stop test.
__device__ __forceinline__ float moved(Pair before, Pair after) { return after.dead() ? 0 : fabsf(float(after.value() - before.value())); }

// F / lam - log w: with the partner's potential, the exponent of the softmax weight inside the half-step that gave F (6).
__device__ __forceinline__ Pair weights_potential(Pair f, double lam, float weight) {
  return f.dead() ? f : pair_of(f.value() / lam - double(logf(weight)));
}

// Potential k of a point after iteration k; k = 0: the start.
__device__ __forceinline__ Pair saved_pair(const SinkhornCall& call, int64_t problem, int64_t k, int64_t at, bool dead) {
  if (dead) return pair_of(-double(kInfinity));
  return k == 0 ? pair_of(0) : pair_of(call.saved[(problem * call.iters + k - 1) * (call.n + call.m) + at]);
}
__device__ __forceinline__ void save_pair(const SinkhornCall& call, int64_t problem, int64_t k, int64_t at, Pair value) {
  if (call.saved) call.saved[(problem * call.iters + k - 1) * (call.n + call.m) + at] = value.value();
}

// dL/dP of an entry: grad_value C + grad_plan.
__device__ __forceinline__ float upstream(const SinkhornCall& call, int64_t problem, int64_t i, int64_t j, float cost, float gv) {
  const float* grad_plan = static_cast<const float*>(call.grad_plan);
  return gv * (cost < kInfinity ? cost : 0) + (grad_plan ? grad_plan[(problem * call.n + i) * call.m + j] : 0);
}

// The threads that own a problem.
template <bool lanes>
struct Team {
  int size, split, me;  // me: this thread in its team
  double* scratch;      // [32]

  __device__ void sync() const {
    if (lanes) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
  // f of everybody's x, the same bits in every thread; `width` lanes at least hold one value.
  template <class T, class F>
  __device__ T all(T x, F f) const {
    const int width = lanes ? size : 32;
    for (int step = width / 2; step; step /= 2) x = f(x, __shfl_xor_sync(kAll, x, step));
    if (lanes) return x;
    __syncthreads();  // the scratch may still be read
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = double(x);
    __syncthreads();
    x = T(scratch[0]);
    for (int warp = 1; warp < size / 32; ++warp) x = f(x, T(scratch[warp]));
    return x;
  }
  // Over the lanes of one point.
  template <class F>
  __device__ float point(float x, F f) const {
    for (int step = split / 2; step; step /= 2) x = f(x, __shfl_xor_sync(kAll, x, step));
    return x;
  }
};

struct Plus {
  template <class T>
  __device__ T operator()(T a, T b) const { return a + b; }
};
struct Larger {
  __device__ float operator()(float a, float b) const { return larger(a, b); }
};

}  // namespace sinkhorn
}  // namespace cuda
}  // namespace kdfast

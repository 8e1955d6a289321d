// Sinkhorn iterations and their exact reverse: the calls bind_sinkhorn.cpp makes. Equations: kdfast/ops/sinkhorn.py.
#pragma once

#include <cstddef>

#include "isa.h"
#include "logits.h"

namespace kdfast {

// "Scaled" potentials are F = f / epsilon, G = g / epsilon: doubles, since at epsilon = 1e-3 they reach 1000, where a float
// is good to 6e-5 and its exponential no better. `void*` arrays are contiguous, in the compute type.
struct SinkhornCall {
  Logits cost;        // [batch, n, m]: rows are (problem, i), the class axis is j
  Rows rows;
  int64_t batch = 0, n = 0, m = 0;
  bool f64 = false;
  double epsilon = 1, lam_a = 1, lam_b = 1;
  double tol = -1;    // negative: no test
  int64_t iters = 1;
  bool rows_first = true;
  const void* a = nullptr;  // [batch, n] and [batch, m] weights; null: 1
  const void* b = nullptr;
  // forward, out (null: not wanted)
  void* plan = nullptr;            // [batch, n, m]
  void* value = nullptr;           // [batch]
  void* f = nullptr;               // [batch, n]
  void* g = nullptr;               // [batch, m]
  // out of the forward, into the backward
  double* saved = nullptr;         // [batch, iters, n + m] scaled potentials after each iteration
  int64_t* iterations = nullptr;   // [batch]
  // backward
  const void* grad_plan = nullptr;   // [batch, n, m]
  const void* grad_value = nullptr;  // [batch]
  const void* grad_f = nullptr;      // [batch, n]
  const void* grad_g = nullptr;      // [batch, m]
  bool envelope = false;             // grad_cost = grad_value P and nothing else
  Logits grad_cost;
  void* grad_a = nullptr;            // [batch, n]
  void* grad_b = nullptr;            // [batch, m]

  void* workspace = nullptr;  // of sinkhorn_workspace bytes, for problems that are solved one after the other
  Status* status = nullptr;   // Bad::student: the cost of a row (problem * n + i), Bad::teacher: the weights of a problem
};

// Up to this many entries a problem belongs to one thread and stays in its caches, as K and its transpose.
constexpr int64_t kSmallProblem = 128 * 128;
static inline bool sinkhorn_small(const SinkhornCall& call) { return call.n * call.m <= kSmallProblem && call.n <= 1024 && call.m <= 1024; }

KD_PER_ISA(std::size_t sinkhorn_workspace(const SinkhornCall& call, bool backward))
KD_PER_ISA(void sinkhorn_forward(const SinkhornCall& call))
KD_PER_ISA(void sinkhorn_backward(const SinkhornCall& call))

}  // namespace kdfast

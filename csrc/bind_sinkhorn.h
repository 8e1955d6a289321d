// Calls of the Sinkhorn kernels from Python's addresses and sizes, for the CPU (bind_sinkhorn.cpp) and CUDA (bind_cuda_sinkhorn.cpp).
#pragma once

#include "bind.h"
#include "cpu/sinkhorn.h"

namespace kdfast {

inline SinkhornCall make_sinkhorn(std::uintptr_t cost, int dtype, const Ints& strides, const Ints& shape, bool f64, std::uintptr_t a,
                                  std::uintptr_t b, double epsilon, int64_t iters, bool rows_first, double lam_a, double lam_b) {
  SinkhornCall call;
  const int64_t dim = int64_t(shape.size()) - 1;
  call.n = shape[dim - 1];
  call.m = shape[dim];
  call.rows = make_rows(shape, dim);
  call.batch = call.rows.count / call.n;
  call.cost = make_logits(cost, dtype, strides, dim, call.rows, "cost");
  call.f64 = f64;
  call.a = pointer<void>(a);
  call.b = pointer<void>(b);
  call.epsilon = epsilon;
  call.iters = iters;
  call.rows_first = rows_first;
  call.lam_a = lam_a;
  call.lam_b = lam_b;
  return call;
}

inline void set_outputs(SinkhornCall& call, double tol, std::uintptr_t plan, std::uintptr_t value, std::uintptr_t f, std::uintptr_t g,
                        std::uintptr_t saved, std::uintptr_t iterations) {
  Logits* const operands[] = {&call.cost};
  merge_axes(call.rows, operands);
  call.tol = tol;
  call.plan = pointer<void>(plan);
  call.value = pointer<void>(value);
  call.f = pointer<void>(f);
  call.g = pointer<void>(g);
  call.saved = pointer<double>(saved);
  call.iterations = pointer<int64_t>(iterations);
}

inline void set_gradients(SinkhornCall& call, int64_t dim, std::uintptr_t saved, std::uintptr_t iterations, std::uintptr_t grad_plan,
                          std::uintptr_t grad_value, std::uintptr_t grad_f, std::uintptr_t grad_g, bool envelope, std::uintptr_t grad_cost,
                          int grad_dtype, const Ints& grad_strides, std::uintptr_t grad_a, std::uintptr_t grad_b) {
  call.grad_cost = make_logits(grad_cost, grad_dtype, grad_strides, dim, call.rows, "grad_cost");
  Logits* const operands[] = {&call.cost, &call.grad_cost};
  merge_axes(call.rows, operands);
  call.saved = pointer<double>(saved);
  call.iterations = pointer<int64_t>(iterations);
  call.grad_plan = pointer<void>(grad_plan);
  call.grad_value = pointer<void>(grad_value);
  call.grad_f = pointer<void>(grad_f);
  call.grad_g = pointer<void>(grad_g);
  call.envelope = envelope;
  call.grad_a = pointer<void>(grad_a);
  call.grad_b = pointer<void>(grad_b);
  if (!call.saved || !call.iterations) throw std::invalid_argument("saved: null address");
}

}  // namespace kdfast

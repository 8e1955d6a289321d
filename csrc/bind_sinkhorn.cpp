#include <cstdlib>
#include <memory>
#include <new>

#include "bind.h"
#include "cpu/sinkhorn.h"

namespace py = pybind11;

namespace kdfast {

struct Free {
  void operator()(void* address) const { std::free(address); }
};

static SinkhornCall make_call(std::uintptr_t cost, int dtype, const Ints& strides, const Ints& shape, bool f64, std::uintptr_t a,
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

static void run(SinkhornCall& call, bool backward) {
  Status status;
  call.status = &status;
  std::unique_ptr<void, Free> workspace;
  if (const std::size_t bytes = KD_CALL(sinkhorn_workspace, call, backward)) {
    const std::size_t whole = (bytes + 4095) & ~std::size_t{4095};
    workspace.reset(std::aligned_alloc(4096, whole));
    if (!workspace) throw std::bad_alloc();
    advise_huge(workspace.get(), whole);
    call.workspace = workspace.get();
  }
  {
    py::gil_scoped_release release;
    if (backward) {
      KD_CALL(sinkhorn_backward, call);
    } else {
      KD_CALL(sinkhorn_forward, call);
    }
  }
  if (status.what() == Bad::student) {
    throw std::invalid_argument("cost: expected finite values (or +inf for a forbidden pair), got NaN or -inf in row " +
                                std::to_string(status.row() % call.n) + " of problem " + std::to_string(status.row() / call.n));
  }
  if (status.what() == Bad::teacher) {
    throw std::invalid_argument("a, b: expected weights >= 0, got a negative one or NaN in problem " + std::to_string(status.row()));
  }
}

void bind_sinkhorn(py::module_& m) {
  m.def("sinkhorn_forward",
        [](std::uintptr_t cost, int dtype, const Ints& strides, const Ints& shape, bool f64, std::uintptr_t a, std::uintptr_t b,
           double epsilon, int64_t iters, bool rows_first, double lam_a, double lam_b, double tol, std::uintptr_t plan,
           std::uintptr_t value, std::uintptr_t f, std::uintptr_t g, std::uintptr_t saved, std::uintptr_t iterations) {
          SinkhornCall call = make_call(cost, dtype, strides, shape, f64, a, b, epsilon, iters, rows_first, lam_a, lam_b);
          if (call.batch == 0) return;
          Logits* const operands[] = {&call.cost};
          merge_axes(call.rows, operands);
          call.tol = tol;
          call.plan = pointer<void>(plan);
          call.value = pointer<void>(value);
          call.f = pointer<void>(f);
          call.g = pointer<void>(g);
          call.saved = pointer<double>(saved);
          call.iterations = pointer<int64_t>(iterations);
          if (call.plan) advise_huge(call.plan, std::size_t(call.batch * call.n * call.m) * (f64 ? 8 : 4));
          run(call, false);
        });
  m.def("sinkhorn_backward",
        [](std::uintptr_t cost, int dtype, const Ints& strides, const Ints& shape, bool f64, std::uintptr_t a, std::uintptr_t b,
           double epsilon, int64_t iters, bool rows_first, double lam_a, double lam_b, std::uintptr_t saved, std::uintptr_t iterations,
           std::uintptr_t grad_plan, std::uintptr_t grad_value, std::uintptr_t grad_f, std::uintptr_t grad_g, bool envelope,
           std::uintptr_t grad_cost, int grad_dtype, const Ints& grad_strides, std::uintptr_t grad_a, std::uintptr_t grad_b) {
          SinkhornCall call = make_call(cost, dtype, strides, shape, f64, a, b, epsilon, iters, rows_first, lam_a, lam_b);
          if (call.batch == 0) return;
          call.grad_cost = make_logits(grad_cost, grad_dtype, grad_strides, int64_t(shape.size()) - 1, call.rows, "grad_cost");
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
          advise_huge(call.grad_cost.data, std::size_t(call.batch * call.n * call.m) * kItemSize[grad_dtype]);
          run(call, true);
        });
}

}  // namespace kdfast

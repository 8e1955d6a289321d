#include <cstdlib>
#include <memory>
#include <new>

#include "bind_sinkhorn.h"

namespace py = pybind11;

namespace kdfast {

struct Free {
  void operator()(void* address) const { std::free(address); }
};

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
          SinkhornCall call = make_sinkhorn(cost, dtype, strides, shape, f64, a, b, epsilon, iters, rows_first, lam_a, lam_b);
          if (call.batch == 0) return;
          set_outputs(call, tol, plan, value, f, g, saved, iterations);
          if (call.plan) advise_huge(call.plan, std::size_t(call.batch * call.n * call.m) * (f64 ? 8 : 4));
          run(call, false);
        });
  m.def("sinkhorn_backward",
        [](std::uintptr_t cost, int dtype, const Ints& strides, const Ints& shape, bool f64, std::uintptr_t a, std::uintptr_t b,
           double epsilon, int64_t iters, bool rows_first, double lam_a, double lam_b, std::uintptr_t saved, std::uintptr_t iterations,
           std::uintptr_t grad_plan, std::uintptr_t grad_value, std::uintptr_t grad_f, std::uintptr_t grad_g, bool envelope,
           std::uintptr_t grad_cost, int grad_dtype, const Ints& grad_strides, std::uintptr_t grad_a, std::uintptr_t grad_b) {
          SinkhornCall call = make_sinkhorn(cost, dtype, strides, shape, f64, a, b, epsilon, iters, rows_first, lam_a, lam_b);
          if (call.batch == 0) return;
          set_gradients(call, int64_t(shape.size()) - 1, saved, iterations, grad_plan, grad_value, grad_f, grad_g, envelope, grad_cost, grad_dtype,
                        grad_strides, grad_a, grad_b);
          advise_huge(call.grad_cost.data, std::size_t(call.batch * call.n * call.m) * kItemSize[grad_dtype]);
          run(call, true);
        });
}

}  // namespace kdfast

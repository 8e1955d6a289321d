#include "bind_sinkhorn.h"
#include "cuda/launch.h"
#include "cuda/sinkhorn.h"

namespace py = pybind11;

namespace kdfast {

static void check_call(SinkhornCall& call, std::uintptr_t workspace) {
  if (call.f64) throw std::invalid_argument("cost: the CUDA Sinkhorn takes float32, bfloat16 and float16");
  call.workspace = pointer<void>(workspace);
}

void bind_cuda_sinkhorn(py::module_& m) {
  m.def("cuda_sinkhorn_workspace",
        [](std::uintptr_t, int64_t n, int64_t m, bool backward) { return cuda::sinkhorn_workspace(n, m, backward); });
  m.def("cuda_sinkhorn_forward",
        [](std::uintptr_t stream, std::uintptr_t cost, int dtype, const Ints& strides, const Ints& shape, bool f64, std::uintptr_t a,
           std::uintptr_t b, double epsilon, int64_t iters, bool rows_first, double lam_a, double lam_b, double tol, std::uintptr_t plan,
           std::uintptr_t value, std::uintptr_t f, std::uintptr_t g, std::uintptr_t saved, std::uintptr_t iterations,
           std::uintptr_t workspace) {
          SinkhornCall call = make_sinkhorn(cost, dtype, strides, shape, f64, a, b, epsilon, iters, rows_first, lam_a, lam_b);
          if (call.batch == 0) return;
          set_outputs(call, tol, plan, value, f, g, saved, iterations);
          check_call(call, workspace);
          cuda::sinkhorn_forward(call, cuda::stream_of(stream));
        });
  m.def("cuda_sinkhorn_backward",
        [](std::uintptr_t stream, std::uintptr_t cost, int dtype, const Ints& strides, const Ints& shape, bool f64, std::uintptr_t a,
           std::uintptr_t b, double epsilon, int64_t iters, bool rows_first, double lam_a, double lam_b, std::uintptr_t saved,
           std::uintptr_t iterations, std::uintptr_t grad_plan, std::uintptr_t grad_value, std::uintptr_t grad_f, std::uintptr_t grad_g,
           bool envelope, std::uintptr_t grad_cost, int grad_dtype, const Ints& grad_strides, std::uintptr_t grad_a, std::uintptr_t grad_b,
           std::uintptr_t workspace) {
          SinkhornCall call = make_sinkhorn(cost, dtype, strides, shape, f64, a, b, epsilon, iters, rows_first, lam_a, lam_b);
          if (call.batch == 0) return;
          set_gradients(call, int64_t(shape.size()) - 1, saved, iterations, grad_plan, grad_value, grad_f, grad_g, envelope, grad_cost, grad_dtype,
                        grad_strides, grad_a, grad_b);
          check_call(call, workspace);
          cuda::sinkhorn_backward(call, cuda::stream_of(stream));
        });
}

}  // namespace kdfast

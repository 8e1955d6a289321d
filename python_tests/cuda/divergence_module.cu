// The CUDA divergence as a Python module over the emulator: the binding, the launchers and the kernels as they ship. Of the
// kernels fewer are compiled, since each costs half a second: every formula for float32, forward KL for the half types.
#include <pybind11/pybind11.h>

#include "cuda/divergence_kernels.cuh"

namespace kdfast {
namespace cuda {

template <class T>
static void forward_kl(const Divergence& call, const DivergencePlan& plan, bool backward, cudaStream_t stream) {
  if (call.kind != Kind::forward_kl) throw std::invalid_argument("kind: not compiled for this test");
  run_kind<Kind::forward_kl, T>(call, plan, backward, stream);
}
template <>
void divergence_run<__nv_bfloat16>(const Divergence& call, const DivergencePlan& plan, bool backward, cudaStream_t stream) {
  forward_kl<__nv_bfloat16>(call, plan, backward, stream);
}
template <>
void divergence_run<__half>(const Divergence& call, const DivergencePlan& plan, bool backward, cudaStream_t stream) {
  forward_kl<__half>(call, plan, backward, stream);
}
template void divergence_run<float>(const Divergence&, const DivergencePlan&, bool, cudaStream_t);
template int divergence_largest_cluster<__nv_bfloat16>(int);

}  // namespace cuda

void bind_cuda_divergence(pybind11::module_& m);

}  // namespace kdfast

PYBIND11_MODULE(emulated_divergence, m) {
  kdfast::bind_cuda_divergence(m);
  m.def("launches", [] { return emulator::launches; });
  m.def("set_order", [](int order) { emulator::order = emulator::Order(order); });
}

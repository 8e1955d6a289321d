// The CUDA bindings over emulated kernels, as a Python module: the tests put it in the place of the compiled core's CUDA part.
// Their sources are included, since most of their compilation is pybind11's headers.
#include "emulator.h"

#include "bind_cuda_routing.cpp"
#include "bind_cuda_sinkhorn.cpp"

PYBIND11_MODULE(emulated_cuda, m) {
  kdfast::bind_cuda_routing(m);
  kdfast::bind_cuda_sinkhorn(m);
  m.def("set_order", [](int order) { emulator::order = emulator::Order(order); });
  m.def("set_multiprocessors", [](int count) { emulator::multiprocessors = count; });
  m.def("set_shared", [](int bytes) { emulator::max_shared = bytes; });
  m.def("launches", [] { return emulator::launches; });
}

// kdfast._C: integers, floats and strings in, nothing of torch. One thin function per kernel call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace py = pybind11;

namespace kdfast {

#ifdef KDFAST_CUDA
void bind_cuda(py::module_& m);
#else
static void bind_cuda(py::module_& m) {
  m.def("cuda_info", [] {
    py::dict info;
    info["built"] = false;
    info["reason"] = "this build has no CUDA kernels";
    return info;
  });
}
#endif
void bind_divergence(py::module_& m);
void bind_memory(py::module_& m);
void bind_pairwise(py::module_& m);
void bind_relation(py::module_& m);
void bind_routing(py::module_& m);
void bind_selective(py::module_& m);
void bind_sinkhorn(py::module_& m);
void bind_sinkhorn_kd(py::module_& m);
void bind_token_graph(py::module_& m);

static void bind_machine(py::module_& m) {
  m.def("isa", [] { return std::string(isa_name(current_isa())); });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (Isa isa : {Isa::baseline, Isa::v3, Isa::v4}) {
      if (isa_usable(isa)) names.emplace_back(isa_name(isa));
    }
    return names;
  });
  m.def("set_isa", [](const std::string& name) {
    if (!set_isa(name.c_str())) {
      std::string usable;
      for (Isa isa : {Isa::baseline, Isa::v3, Isa::v4}) {
        if (isa_usable(isa)) usable += std::string(usable.empty() ? "" : ", ") + isa_name(isa);
      }
      throw std::invalid_argument("KDFAST_CPU_ISA: expected one of " + usable + " on this machine, got '" + name + "'");
    }
  });
  m.def("set_parallel", [](std::uintptr_t address) { set_parallel(reinterpret_cast<TorchParallelFor>(address)); });
  m.def("set_serial", [] { set_serial(); });
  m.def("pool", [] { return std::string(pool_name()); });
}

}  // namespace kdfast

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of kdfast: kernels over addresses.";
  kdfast::bind_machine(m);
  kdfast::bind_cuda(m);
  kdfast::bind_divergence(m);
  kdfast::bind_memory(m);
  kdfast::bind_pairwise(m);
  kdfast::bind_relation(m);
  kdfast::bind_routing(m);
  kdfast::bind_selective(m);
  kdfast::bind_sinkhorn(m);
  kdfast::bind_sinkhorn_kd(m);
  kdfast::bind_token_graph(m);
}

// What the CUDA part of the core says about itself; kernels have a binding per op beside this one (bind_cuda_<op>.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/machine.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace kdfast {

void bind_cuda_divergence(py::module_& m);
void bind_cuda_routing(py::module_& m);
void bind_cuda_sinkhorn(py::module_& m);

static std::string spoken(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

void bind_cuda(py::module_& m) {
  // Never raises: a machine without a driver is told so in `reason`.
  m.def("cuda_info", [] {
    int runtime = 0, driver = 0, devices = 0;
    cudaRuntimeGetVersion(&runtime);
    cudaDriverGetVersion(&driver);
    const cudaError_t error = cudaGetDeviceCount(&devices);
    py::object reason = py::none();
    if (error == cudaErrorInsufficientDriver && driver == 0) {
      reason = py::str("no NVIDIA driver");
    } else if (error == cudaErrorInsufficientDriver) {
      reason = py::str("driver older than CUDA " + std::to_string(runtime / 1000) + ": Triton is used");
    } else if (error != cudaSuccess) {
      reason = py::str(cudaGetErrorString(error));
    } else if (devices == 0) {
      reason = py::str("no GPU");
    }
    if (error != cudaSuccess) cudaGetLastError(), devices = 0;
    py::dict info;
    info["built"] = true;
    info["reason"] = reason;
    info["archs"] = KDFAST_CUDA_ARCHS;
    info["runtime"] = spoken(runtime);
    info["driver"] = driver ? py::object(py::str(spoken(driver))) : py::object(py::none());
    info["devices"] = devices;
    return info;
  });
  m.def("cuda_device", [](int index) {
    const cuda::Device found = cuda::device(index);
    py::dict device;
    device["capability"] = found.capability;
    device["shared_bytes"] = found.shared_bytes;
    device["multiprocessors"] = found.multiprocessors;
    device["reason"] = found.reason.empty() ? py::object(py::none()) : py::object(py::str(found.reason));
    return device;
  });
  bind_cuda_divergence(m);
  bind_cuda_routing(m);
  bind_cuda_sinkhorn(m);
}

}  // namespace kdfast

// Tensors over memory that comes back (memory.h), handed to Python as DLPack capsules: the one exchange that needs no torch header.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "logits.h"
#include "memory.h"

namespace py = pybind11;

namespace kdfast {

namespace {
// The layout DLPack 0.x fixes (dmlc/dlpack, dlpack.h).
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
struct Owned {
  DLManagedTensor managed;
  std::vector<int64_t> shape, strides;
};

void give_back(DLManagedTensor* managed) {
  KeptMemory::instance().give(managed->tensor.data);
  delete static_cast<Owned*>(managed->context);
}

// A capsule whose name is still "dltensor" was never made a tensor.
void drop(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  managed->deleter(managed);
}

py::object kept_tensor(std::vector<int64_t> shape, std::vector<int64_t> strides, int dtype) {
  if (shape.size() != strides.size()) throw std::invalid_argument("strides: expected one for each axis of shape");
  constexpr int32_t kCpu = 1;
  constexpr uint8_t kFloat = 2, kBfloat = 4;
  std::size_t bytes = kItemSize[dtype];
  for (int64_t size : shape) bytes *= std::size_t(size);
  auto* owned = new Owned{{}, std::move(shape), std::move(strides)};
  owned->managed.tensor = {nullptr, kCpu, 0, int32_t(owned->shape.size()), Dtype(dtype) == Dtype::bf16 ? kBfloat : kFloat,
                           uint8_t(8 * kItemSize[dtype]), 1, owned->shape.data(), owned->strides.data(), 0};
  owned->managed.context = owned;
  owned->managed.deleter = give_back;
  try {
    owned->managed.tensor.data = KeptMemory::instance().take(bytes);
  } catch (...) {
    delete owned;
    throw;
  }
  PyObject* capsule = PyCapsule_New(&owned->managed, "dltensor", drop);
  if (!capsule) {
    give_back(&owned->managed);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(capsule);
}
}  // namespace

void bind_memory(py::module_& m) {
  m.def("kept_tensor", kept_tensor);
  m.def("set_kept_limit", [](std::size_t bytes) { KeptMemory::instance().set_limit(bytes); });
  m.def("kept_limit", [] { return KeptMemory::instance().limit(); });
  m.def("kept_idle", [] { return KeptMemory::instance().idle(); });
  m.def("release_kept", [] { KeptMemory::instance().release(); });
}

}  // namespace kdfast

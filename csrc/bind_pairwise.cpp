#include "bind.h"
#include "cpu/pairwise.h"

namespace py = pybind11;

namespace kdfast {

int64_t pairwise_chunks(int64_t batch, int64_t n, int64_t m, int64_t width) {
  const int64_t tiles = batch * ((n + kTileRows - 1) / kTileRows) * ((m + kTileOthers - 1) / kTileOthers);
  const int64_t wanted = tiles >= 16 ? 1 : 16 / std::max<int64_t>(1, tiles);
  return std::max<int64_t>(1, std::min(wanted, width / 4096));
}

static PointSet make_points(std::uintptr_t address, int dtype, const Ints& strides, int64_t rows, const char* name) {
  if (!address) throw std::invalid_argument(std::string(name) + ": null address for a tensor with elements");
  PointSet set;
  set.data = pointer<void>(address);
  set.dtype = Dtype(dtype);
  set.batch_stride = strides[0];
  set.row_stride = strides[1];
  set.column_stride = strides[2];
  set.rows = rows;
  return set;
}

// Strides are those of [batch, rows, width] tensors; sizes = (batch, N, M, width), none of them 0.
static PairwiseCost make_call(std::uintptr_t x, int x_dtype, const Ints& x_strides, std::uintptr_t y, int y_dtype, const Ints& y_strides,
                              const Ints& sizes, int p) {
  PairwiseCost call;
  call.batch = sizes[0];
  call.width = sizes[3];
  call.x = make_points(x, x_dtype, x_strides, sizes[1], "x");
  call.y = make_points(y, y_dtype, y_strides, sizes[2], "y");
  call.p = p;
  call.f64 = call.x.dtype == Dtype::f64 || call.y.dtype == Dtype::f64;
  return call;
}

void bind_pairwise(py::module_& m) {
  m.def("pairwise_cost", [](std::uintptr_t x, int x_dtype, const Ints& x_strides, std::uintptr_t y, int y_dtype, const Ints& y_strides,
                            const Ints& sizes, int p, std::uintptr_t cost) {
    PairwiseCost call = make_call(x, x_dtype, x_strides, y, y_dtype, y_strides, sizes, p);
    if (!cost) throw std::invalid_argument("cost: null address");
    call.cost = pointer<void>(cost);
    call.chunks = pairwise_chunks(sizes[0], sizes[1], sizes[2], sizes[3]);
    std::vector<char> partial;
    const std::size_t bytes = std::size_t(sizes[0] * sizes[1] * sizes[2]) * (call.f64 ? 8 : 4);
    if (call.chunks > 1) partial.resize(bytes * std::size_t(call.chunks));
    call.partial = partial.data();
    advise_huge(call.cost, bytes);
    py::gil_scoped_release release;
    KD_CALL(pairwise_cost, call);
  });
  m.def("pairwise_cost_backward",
        [](std::uintptr_t grad, const Ints& grad_strides, std::uintptr_t x, int x_dtype, const Ints& x_strides, std::uintptr_t y, int y_dtype,
           const Ints& y_strides, const Ints& sizes, int p, std::uintptr_t grad_x) {
          PairwiseCost call = make_call(x, x_dtype, x_strides, y, y_dtype, y_strides, sizes, p);
          if (!grad || !grad_x) throw std::invalid_argument("grad: null address");
          call.grad = pointer<void>(grad);
          for (int i = 0; i < 3; ++i) call.grad_strides[i] = grad_strides[i];
          call.grad_x = make_points(grad_x, x_dtype, {sizes[1] * sizes[3], sizes[3], 1}, sizes[1], "grad_x");
          advise_huge(call.grad_x.data, std::size_t(sizes[0] * sizes[1] * sizes[3]) * kItemSize[x_dtype]);
          py::gil_scoped_release release;
          KD_CALL(pairwise_cost_backward, call);
        });
}

}  // namespace kdfast

// SinKD's loss in one call: softened rows, their cost, the transport problem, its reverse, and the gradients of the logits.
#include <cstdlib>
#include <memory>
#include <new>

#include "bind.h"
#include "cpu/pairwise.h"
#include "cpu/sinkhorn.h"
#include "cpu/sinkhorn_kd.h"

namespace py = pybind11;

namespace kdfast {
namespace {

struct Free {
  void operator()(void* address) const { std::free(address); }
};
using Memory = std::unique_ptr<char, Free>;

Memory allocate(std::size_t bytes) {
  const std::size_t whole = (bytes + 4095) & ~std::size_t{4095};
  Memory memory(static_cast<char*>(std::aligned_alloc(4096, whole ? whole : 4096)));
  if (!memory) throw std::bad_alloc();
  advise_huge(memory.get(), whole);
  return memory;
}

struct Side {  // one model
  std::uintptr_t address;
  int dtype;
  const Ints& strides;
  std::uintptr_t grad;
  int grad_dtype;
  const Ints& grad_strides;
  const char* name;
  Bad bad;
};

struct Loss {
  Ints sizes;  // batch, N, M, C
  bool f64;
  const uint8_t* mask;
  double temperature, epsilon;
  int64_t iters;
  int p;
  bool rows_first;
  std::size_t item() const { return f64 ? 8 : 4; }
};

SoftRows soft_rows(const Loss& loss, const Side& side, int64_t count, char* probs, char* kept, Status& status) {
  SoftRows rows;
  rows.rows = make_rows({loss.sizes[0], count, loss.sizes[3]}, 2);
  rows.logits = make_logits(side.address, side.dtype, side.strides, 2, rows.rows, side.name);
  rows.grad_logits = make_logits(side.grad, side.grad_dtype, side.grad_strides, 2, rows.rows, side.name, true);
  rows.width = loss.sizes[3];
  rows.f64 = loss.f64;
  rows.inverse_t = 1 / loss.temperature;
  rows.mask = loss.mask;
  rows.bad = side.bad;
  rows.status = &status;
  rows.probs = probs;
  rows.kept = kept;
  return rows;
}

PointSet dense_points(const Loss& loss, void* data, int64_t rows) {
  PointSet set;
  set.data = data;
  set.dtype = loss.f64 ? Dtype::f64 : Dtype::f32;
  set.batch_stride = rows * loss.sizes[3];
  set.row_stride = loss.sizes[3];
  set.rows = rows;
  return set;
}

template <class T>
double sum_all(const void* values, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += double(static_cast<const T*>(values)[i]);
  return total;
}

void put(void* address, int64_t index, double value, bool f64) {
  if (f64) {
    static_cast<double*>(address)[index] = value;
  } else {
    static_cast<float*>(address)[index] = float(value);
  }
}

void run(const Loss& loss, const Side& student, const Side& teacher, double scale, bool mean, void* out_loss, void* out_rows) {
  const int64_t batch = loss.sizes[0], n = loss.sizes[1], m = loss.sizes[2], width = loss.sizes[3];
  const std::size_t item = loss.item(), pairs = std::size_t(batch * n * m) * item;
  const bool wanted = student.grad || teacher.grad;
  const int64_t more = n > m ? n : m;
  // Softened rows and their gradient, pairs and theirs, per-row and per-problem numbers; each part starts on a cache line.
  std::size_t used = 0;
  const auto part = [&](std::size_t bytes) {
    const std::size_t start = used;
    used += (bytes + 63) & ~std::size_t{63};
    return start;
  };
  const std::size_t p_at = part(std::size_t(batch * n * width) * item), q_at = part(std::size_t(batch * m * width) * item);
  const std::size_t w_at = part(pairs), dw_at = part(wanted ? pairs : 0);
  const std::size_t dp_at = part(wanted ? std::size_t(batch * more * width) * item : 0);
  const std::size_t kept_s = part(std::size_t(batch * n) * item), kept_t = part(std::size_t(batch * m) * item);
  const std::size_t ones_at = part(std::size_t(batch) * item), iterations_at = part(std::size_t(batch) * 8);
  const std::size_t saved_at = part(wanted ? std::size_t(batch * loss.iters * (n + m)) * 8 : 0);
  const Memory memory = allocate(used);
  char* const base = memory.get();

  Status status;
  SoftRows s = soft_rows(loss, student, n, base + p_at, base + kept_s, status);
  SoftRows t = soft_rows(loss, teacher, m, base + q_at, base + kept_t, status);
  PairwiseCost cost;
  cost.batch = batch;
  cost.width = width;
  cost.p = loss.p;
  cost.f64 = loss.f64;
  cost.x = dense_points(loss, base + p_at, n);
  cost.y = dense_points(loss, base + q_at, m);
  cost.cost = base + w_at;
  cost.chunks = pairwise_chunks(batch, n, m, width);
  Memory partial = cost.chunks > 1 ? allocate(pairs * std::size_t(cost.chunks)) : Memory();
  cost.partial = partial.get();

  SinkhornCall problem;
  problem.n = n;
  problem.m = m;
  problem.batch = batch;
  problem.rows = make_rows({batch * n, m}, 1);
  const Ints dense = {m, 1};
  problem.cost = make_logits(reinterpret_cast<std::uintptr_t>(base + w_at), loss.f64 ? 3 : 0, dense, 1, problem.rows, "cost");
  problem.f64 = loss.f64;
  problem.epsilon = loss.epsilon;
  problem.iters = loss.iters;
  problem.rows_first = loss.rows_first;
  problem.a = base + kept_s;
  problem.b = base + kept_t;
  problem.value = out_rows;
  problem.saved = wanted ? reinterpret_cast<double*>(base + saved_at) : nullptr;
  problem.iterations = reinterpret_cast<int64_t*>(base + iterations_at);
  problem.status = &status;
  const std::size_t forward_bytes = KD_CALL(sinkhorn_workspace, problem, false);
  const std::size_t bytes = wanted ? KD_CALL(sinkhorn_workspace, problem, true) : forward_bytes;
  Memory workspace = bytes ? allocate(bytes > forward_bytes ? bytes : forward_bytes) : Memory();
  problem.workspace = workspace.get();

  py::gil_scoped_release release;
  KD_CALL(soften, s);
  KD_CALL(soften, t);
  if (status.what() != Bad::none) {
    py::gil_scoped_acquire acquire;
    raise_bad(status, nullptr, 0);
  }
  KD_CALL(pairwise_cost, cost);
  if (loss.p == 2) KD_CALL(roots, base + w_at, batch * n * m, loss.f64);
  KD_CALL(sinkhorn_forward, problem);
  double factor = scale;
  if (mean) {
    const double rows = loss.f64 ? sum_all<double>(base + kept_t, batch * m) : sum_all<float>(base + kept_t, batch * m);
    factor /= rows > 1 ? rows : 1;
  }
  double total = 0;
  for (int64_t i = 0; i < batch; ++i) {
    const double value = loss.f64 ? static_cast<double*>(out_rows)[i] : double(static_cast<float*>(out_rows)[i]);
    total += value;
    put(out_rows, i, factor * value, loss.f64);
    put(base + ones_at, i, 1.0, loss.f64);
  }
  put(out_loss, 0, factor * total, loss.f64);
  if (!wanted) return;

  problem.grad_value = base + ones_at;
  problem.grad_cost = make_logits(reinterpret_cast<std::uintptr_t>(base + dw_at), loss.f64 ? 3 : 0, dense, 1, problem.rows, "grad_cost");
  KD_CALL(sinkhorn_backward, problem);
  if (loss.p == 2) KD_CALL(root_gradients, base + w_at, base + dw_at, batch * n * m, loss.f64);
  cost.grad = base + dw_at;
  for (SoftRows* side : {&s, &t}) {
    if (!side->grad_logits.data) continue;
    const bool first = side == &s;
    if (!first) std::swap(cost.x, cost.y);
    cost.grad_strides[0] = n * m;
    cost.grad_strides[1] = first ? m : 1;
    cost.grad_strides[2] = first ? 1 : m;
    cost.grad_x = dense_points(loss, base + dp_at, first ? n : m);
    KD_CALL(pairwise_cost_backward, cost);
    side->grad = base + dp_at;
    side->factor = factor;
    KD_CALL(soften_backward, *side);
  }
}

}  // namespace

void bind_sinkhorn_kd(py::module_& module) {
  module.def("sinkhorn_kd", [](std::uintptr_t s, int s_dtype, const Ints& s_strides, std::uintptr_t t, int t_dtype, const Ints& t_strides,
                               const Ints& sizes, bool f64, std::uintptr_t mask, double temperature, double epsilon, int64_t iters, int p,
                               bool rows_first, double scale, bool mean, std::uintptr_t loss, std::uintptr_t rows, std::uintptr_t gs,
                               int gs_dtype, const Ints& gs_strides, std::uintptr_t gt, int gt_dtype, const Ints& gt_strides) {
    if (!loss || (sizes[0] > 0 && !rows)) throw std::invalid_argument("loss: null address");
    const Loss options{sizes, f64, pointer<uint8_t>(mask), temperature, epsilon, iters, p, rows_first};
    if (sizes[0] == 0) return put(pointer<void>(loss), 0, 0.0, f64);
    run(options, {s, s_dtype, s_strides, gs, gs_dtype, gs_strides, "student", Bad::student},
        {t, t_dtype, t_strides, gt, gt_dtype, gt_strides, "teacher", Bad::teacher}, scale, mean, pointer<void>(loss), pointer<void>(rows));
  });
}

}  // namespace kdfast

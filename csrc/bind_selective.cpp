#include "bind.h"
#include "cpu/selective.h"
#include "parallel.h"

namespace py = pybind11;

namespace kdfast {

enum class Normalizer : int { valid = 0, selected = 1, all = 2 };

struct Totals {
  double loss[2] = {0, 0};
  int64_t count[3] = {0, 0, 0};  // valid, to a, to b
};

// One pass over both maps. The same block sums in the same order for any number of threads.
static Totals pass(SelectiveCall& call) {
  const int64_t blocks = selective_blocks(call);
  std::vector<double> loss(std::size_t(2 * blocks));
  std::vector<int64_t> count(std::size_t(3 * blocks));
  Status status;
  call.loss = loss.data();
  call.count = count.data();
  call.status = &status;
  KD_CALL(selective_run, call);
  if (status.what() == Bad::label) {
    throw std::invalid_argument("labels: expected integers in [0, " + std::to_string(call.classes) + ") or ignore_index=" +
                                std::to_string(call.ignore_index) + ", got " + std::to_string(call.labels[status.row()]) + " at pixel " +
                                std::to_string(status.row()));
  }
  raise_bad(status, call.labels, call.classes, "logits_a", "logits_b");
  Totals totals;
  for (int64_t i = 0; i < blocks; ++i) {
    for (int k = 0; k < 2; ++k) totals.loss[k] += loss[std::size_t(2 * i + k)];
    for (int k = 0; k < 3; ++k) totals.count[k] += count[std::size_t(3 * i + k)];
  }
  return totals;
}

static int64_t count_labels(const int64_t* labels, int64_t n, int64_t ignore_index) {
  constexpr int64_t block = 16384;
  std::vector<int64_t> counts(std::size_t((n + block - 1) / block));
  parallel_for(int64_t(counts.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t kept = 0;
      for (int64_t j = i * block; j < std::min(n, (i + 1) * block); ++j) kept += labels[j] != ignore_index;
      counts[std::size_t(i)] = kept;
    }
  });
  int64_t total = 0;
  for (const int64_t kept : counts) total += kept;
  return total;
}

// Z of both directions.
static void normalize(const Totals& totals, Normalizer normalizer, int64_t pixels, double (&z)[2]) {
  for (int side = 0; side < 2; ++side) {
    const int64_t n = normalizer == Normalizer::valid ? totals.count[0] : normalizer == Normalizer::selected ? totals.count[1 + side] : pixels;
    z[side] = double(std::max<int64_t>(1, n));
  }
}

// The gradients need Z before the pass that finds the selected pixels, and a stored gradient is written once, in its final
// dtype. "valid": counted from the labels first; "selected": a first pass without gradients finds it. Where the guess was wrong
// (a pixel of only -inf does not count) the pass is made again.
static Totals run(SelectiveCall& call, Normalizer normalizer, double factor, double (&z)[2]) {
  Logits* const grads[2] = {&call.grad_a, &call.grad_b};
  const bool wanted = call.grad_a.data || call.grad_b.data;
  Totals totals;
  if (wanted && normalizer == Normalizer::selected) {
    void* const kept[2] = {call.grad_a.data, call.grad_b.data};
    for (Logits* grad : grads) grad->data = nullptr;
    totals = pass(call);
    for (int side = 0; side < 2; ++side) grads[side]->data = kept[side];
  } else if (wanted && normalizer == Normalizer::valid) {
    totals.count[0] = count_labels(call.labels, call.rows.count, call.ignore_index);
  }
  normalize(totals, normalizer, call.rows.count, z);
  for (;;) {
    double* const scales[2] = {&call.scale_a, &call.scale_b};
    // float16 keeps p_student - p_teacher: times 1 / Z it would be lost before a loss scaler's factor arrives
    for (int side = 0; side < 2; ++side) *scales[side] = grads[side]->dtype == Dtype::f16 ? 1 : factor / (call.temperature * z[side]);
    totals = pass(call);
    const double before[2] = {z[0], z[1]};
    normalize(totals, normalizer, call.rows.count, z);
    if (!wanted || (z[0] == before[0] && z[1] == before[1])) return totals;
  }
}

template <class T>
static void write(const Totals& totals, const double (&z)[2], double factor, const SelectiveCall& call, std::uintptr_t to_a, std::uintptr_t to_b,
                  std::uintptr_t scale) {
  *pointer<T>(to_a) = T(factor * totals.loss[0] / z[0]);
  *pointer<T>(to_b) = T(factor * totals.loss[1] / z[1]);
  const Dtype dtypes[2] = {call.grad_a.dtype, call.grad_b.dtype};
  for (int side = 0; side < 2; ++side) pointer<T>(scale)[side] = dtypes[side] == Dtype::f16 ? T(factor / (call.temperature * z[side])) : T(1);
}

void bind_selective(py::module_& m) {
  m.def("selective_kl",
        [](std::uintptr_t a, int a_dtype, const Ints& a_strides, std::uintptr_t b, int b_dtype, const Ints& b_strides, const Ints& shape,
           std::uintptr_t labels, double temperature, int64_t ignore_index, int normalizer, bool entropy, double factor, std::uintptr_t grad_a,
           int grad_a_dtype, const Ints& grad_a_strides, std::uintptr_t grad_b, int grad_b_dtype, const Ints& grad_b_strides,
           std::uintptr_t to_a, std::uintptr_t to_b, std::uintptr_t direction, std::uintptr_t valid, std::uintptr_t reliability_a,
           std::uintptr_t reliability_b, std::uintptr_t counts, std::uintptr_t scale) {
          SelectiveCall call;
          call.rows = make_rows(shape, 1);
          call.a = make_logits(a, a_dtype, a_strides, 1, call.rows, "logits_a");
          call.b = make_logits(b, b_dtype, b_strides, 1, call.rows, "logits_b");
          call.grad_a = make_logits(grad_a, grad_a_dtype, grad_a_strides, 1, call.rows, "grad_a", true);
          call.grad_b = make_logits(grad_b, grad_b_dtype, grad_b_strides, 1, call.rows, "grad_b", true);
          Logits* const operands[] = {&call.a, &call.b, &call.grad_a, &call.grad_b};
          merge_axes(call.rows, operands);
          call.classes = shape[1];
          call.labels = pointer<int64_t>(labels);
          call.temperature = temperature;
          call.ignore_index = ignore_index;
          call.entropy = entropy;
          call.f64 = call.a.dtype == Dtype::f64 || call.b.dtype == Dtype::f64;
          call.direction = pointer<int8_t>(direction);
          call.valid = pointer<bool>(valid);
          call.reliability_a = pointer<void>(reliability_a);
          call.reliability_b = pointer<void>(reliability_b);
          for (const std::uintptr_t output : {to_a, to_b, counts, scale}) {
            if (!output) throw std::invalid_argument("selective_kl: null address of an output");
          }
          const int64_t pixels = call.rows.count;
          Totals totals;
          double z[2] = {1, 1};
          if (pixels > 0) {
            for (const std::uintptr_t map : {labels, direction, valid, reliability_a, reliability_b}) {
              if (!map) throw std::invalid_argument("labels: null address for a tensor with elements");
            }
            for (const Logits* grad : {&call.grad_a, &call.grad_b}) {
              const std::size_t bytes = std::size_t(pixels * call.classes) * kItemSize[int(grad->dtype)];
              if (grad->data) advise_huge(grad->data, bytes);
              call.stream |= grad->data && bytes >= (std::size_t(32) << 20);
            }
            for (void* map : {call.reliability_a, call.reliability_b}) advise_huge(map, std::size_t(pixels) * (call.f64 ? 8 : 4));
            py::gil_scoped_release release;
            totals = run(call, Normalizer(normalizer), factor, z);
          }
          if (call.f64) {
            write<double>(totals, z, factor, call, to_a, to_b, scale);
          } else {
            write<float>(totals, z, factor, call, to_a, to_b, scale);
          }
          for (int i = 0; i < 3; ++i) pointer<int64_t>(counts)[i] = totals.count[i];
        });
}

}  // namespace kdfast

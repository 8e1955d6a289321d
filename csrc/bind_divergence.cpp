#include <cmath>

#include "bind.h"
#include "cpu/divergence.h"

namespace py = pybind11;

namespace kdfast {

// Taylor coefficients of d^2, d^3, ... of one kind's term / q (divergence_terms.h), in double.
static void js_series(double b, double* out) {
  // term / q = b d e^d - m K,  m = 1 - b + b e^d,  K = log m;  K' = b e^d / m gives K's series by division
  constexpr int n = 19;
  double e[n], m[n], slope[n], K[n] = {};
  double factorial = 1;
  for (int i = 0; i < n; ++i) {
    if (i) factorial *= i;
    e[i] = 1 / factorial;
    m[i] = b * e[i] + (i == 0 ? 1 - b : 0);
  }
  for (int i = 0; i < n; ++i) {
    slope[i] = b * e[i];
    for (int j = 0; j < i; ++j) slope[i] -= slope[j] * m[i - j];
  }
  for (int i = 1; i < n; ++i) K[i] = slope[i - 1] / i;
  for (int i = 2; i < n - 1; ++i) {
    double value = b * e[i - 1];
    for (int j = 0; j <= i; ++j) value -= m[j] * K[i - j];
    out[i - 2] = value;
    if (i - 2 == 15) break;
  }
}

static void alpha_series(double a, double* out) {
  // (e^{a d} - a e^d - (1 - a)) / (a (a - 1)): coefficient of d^n is (1 + a + ... + a^{n-2}) / n!
  double factorial = 1, sum = 0, power = 1;
  for (int n = 2; n < 18; ++n) {
    factorial *= n;
    sum += power;
    power *= a;
    out[n - 2] = sum / factorial;
  }
}

static void set_kind(DivergenceCall& call, const std::string& kind, double a, double b) {
  KindParameters& k = call.parameters;
  k.beta = a;
  if (kind == "forward_kl") {
    call.kind = Kind::forward_kl;
  } else if (kind == "reverse_kl") {
    call.kind = Kind::reverse_kl;
  } else if (kind == "jeffreys") {
    call.kind = Kind::jeffreys;
  } else if (kind == "js" || kind == "js_rescaled") {
    if (a == 0 || a == 1) {
      call.kind = a == 0 ? Kind::forward_kl : Kind::reverse_kl;
      return;
    }
    call.kind = Kind::js;
    k.small = 0.25;
    js_series(a, k.series);
    if (kind == "js_rescaled") k.scale = 1 / (a * (1 - a));
  } else if (kind == "skew_forward_kl" || kind == "skew_reverse_kl") {
    const bool forward = kind == "skew_forward_kl";
    call.zero = a == 1;  // the mixture is the first distribution itself
    call.kind = a == 0 || a == 1 ? (forward ? Kind::forward_kl : Kind::reverse_kl) : (forward ? Kind::skew_forward_kl : Kind::skew_reverse_kl);
  } else if (kind == "tvd") {
    call.kind = Kind::tvd;
  } else if (kind == "alpha") {
    if (a == 0 || a == 1) {
      call.kind = a == 1 ? Kind::forward_kl : Kind::reverse_kl;
      return;
    }
    call.kind = Kind::alpha;
    k.small = 0.25 / std::max(1.0, std::abs(a));
    alpha_series(a, k.series);
  } else if (kind == "dkd") {
    call.kind = Kind::dkd;
    call.dkd[0] = a;
    call.dkd[1] = b;
  } else if (kind == "binary") {
    call.kind = Kind::binary;
  } else {
    throw std::invalid_argument("kind: unknown to the compiled core: " + kind);
  }
}

constexpr std::size_t kStreamBytes = std::size_t{32} << 20;

struct Operand {
  std::uintptr_t address;
  int dtype;
  const Ints& strides;
};

static DivergenceCall make_call(const Operand& student, const Operand& teacher, const Ints& shape, int64_t teacher_width, int64_t dim,
                                int64_t classes, const std::string& kind, double a, double b, double temperature,
                                std::uintptr_t labels, std::uintptr_t row_temperature, const Operand& grad_student,
                                const Operand& grad_teacher) {
  DivergenceCall call;
  set_kind(call, kind, a, b);
  call.rows = make_rows(shape, dim);
  call.student = make_logits(student.address, student.dtype, student.strides, dim, call.rows, "student");
  call.teacher = make_logits(teacher.address, teacher.dtype, teacher.strides, dim, call.rows, "teacher");
  call.grad_student = make_logits(grad_student.address, grad_student.dtype, grad_student.strides, dim, call.rows, "grad_student", true);
  call.grad_teacher = make_logits(grad_teacher.address, grad_teacher.dtype, grad_teacher.strides, dim, call.rows, "grad_teacher", true);
  Logits* const operands[] = {&call.student, &call.teacher, &call.grad_student, &call.grad_teacher};
  merge_axes(call.rows, operands);
  call.classes = classes;
  call.student_width = shape[dim];
  call.teacher_width = teacher_width;
  call.temperature = temperature;
  call.labels = pointer<int64_t>(labels);
  call.row_temperature = pointer<void>(row_temperature);
  call.f64 = call.student.dtype == Dtype::f64 || call.teacher.dtype == Dtype::f64;
  for (Logits* grad : {&call.grad_student, &call.grad_teacher}) {
    if (grad->data) {
      const int64_t width = grad == &call.grad_student ? call.student_width : call.teacher_width;
      const std::size_t bytes = std::size_t(call.rows.count * width) * kItemSize[int(grad->dtype)];
      advise_huge(grad->data, bytes);
      if (bytes > kStreamBytes && call.labels == nullptr) call.stream = true;
    }
  }
  return call;
}

static void run(DivergenceCall& call) {
  Status status;
  call.status = &status;
  {
    py::gil_scoped_release release;
    KD_CALL(divergence_run, call);
  }
  raise_bad(status, call.labels, call.classes);
}

void bind_divergence(py::module_& m) {
  m.def("divergence_rows",
        [](std::uintptr_t s, int s_dtype, const Ints& s_strides, std::uintptr_t t, int t_dtype, const Ints& t_strides, const Ints& shape,
           int64_t teacher_width, int64_t dim, int64_t classes, const std::string& kind, double a, double b, double temperature,
           std::uintptr_t labels, std::uintptr_t row_temperature, std::uintptr_t rows, std::uintptr_t stats) {
          const Ints empty;
          DivergenceCall call = make_call({s, s_dtype, s_strides}, {t, t_dtype, t_strides}, shape, teacher_width, dim, classes, kind, a, b,
                                          temperature, labels, row_temperature, {0, 0, empty}, {0, 0, empty});
          if (call.rows.count == 0) return;
          call.out_rows = pointer<void>(rows);
          call.stats = pointer<void>(stats);
          if (!call.out_rows || !call.stats) throw std::invalid_argument("rows: null address");
          run(call);
        });
  m.def("divergence_rows_backward",
        [](std::uintptr_t s, int s_dtype, const Ints& s_strides, std::uintptr_t t, int t_dtype, const Ints& t_strides, const Ints& shape,
           int64_t teacher_width, int64_t dim, int64_t classes, const std::string& kind, double a, double b, double temperature,
           std::uintptr_t labels, std::uintptr_t row_temperature, std::uintptr_t grad_rows, std::uintptr_t stats, std::uintptr_t gs,
           int gs_dtype, const Ints& gs_strides, std::uintptr_t gt, int gt_dtype, const Ints& gt_strides) {
          DivergenceCall call = make_call({s, s_dtype, s_strides}, {t, t_dtype, t_strides}, shape, teacher_width, dim, classes, kind, a, b,
                                          temperature, labels, row_temperature, {gs, gs_dtype, gs_strides}, {gt, gt_dtype, gt_strides});
          if (call.rows.count == 0) return;
          call.grad_rows = pointer<void>(grad_rows);
          call.stats = pointer<void>(stats);
          if (!call.grad_rows || !call.stats) throw std::invalid_argument("grad_rows: null address");
          run(call);
        });
  m.def("divergence_sum",
        [](std::uintptr_t s, int s_dtype, const Ints& s_strides, std::uintptr_t t, int t_dtype, const Ints& t_strides, const Ints& shape,
           int64_t teacher_width, int64_t dim, int64_t classes, const std::string& kind, double a, double b, double temperature,
           std::uintptr_t labels, std::uintptr_t row_temperature, std::uintptr_t row_weight, double kd_factor, double ce_factor,
           double label_smoothing, std::uintptr_t gs, int gs_dtype, const Ints& gs_strides, std::uintptr_t gt, int gt_dtype,
           const Ints& gt_strides, std::uintptr_t loss, std::uintptr_t parts) {
          DivergenceCall call = make_call({s, s_dtype, s_strides}, {t, t_dtype, t_strides}, shape, teacher_width, dim, classes, kind, a, b,
                                          temperature, labels, row_temperature, {gs, gs_dtype, gs_strides}, {gt, gt_dtype, gt_strides});
          call.row_weight = pointer<void>(row_weight);
          call.kd_factor = kd_factor;
          call.ce_factor = ce_factor;
          call.label_smoothing = label_smoothing;
          const int64_t blocks = KD_CALL(divergence_blocks, call);
          std::vector<double> kd(blocks), ce(blocks);
          call.partial_kd = kd.data();
          call.partial_ce = ce.data();
          if (call.rows.count > 0) run(call);
          double kd_total = 0, ce_total = 0;
          for (int64_t i = 0; i < blocks; ++i) {
            kd_total += kd[i];
            ce_total += ce[i];
          }
          const double values[3] = {(kd_factor == 0 ? 0 : kd_factor * kd_total) + (ce_factor == 0 ? 0 : ce_factor * ce_total), kd_total, ce_total};
          if (call.f64) {
            *pointer<double>(loss) = values[0];
            pointer<double>(parts)[0] = values[1];
            pointer<double>(parts)[1] = values[2];
          } else {
            *pointer<float>(loss) = float(values[0]);
            pointer<float>(parts)[0] = float(values[1]);
            pointer<float>(parts)[1] = float(values[2]);
          }
        });
}

}  // namespace kdfast

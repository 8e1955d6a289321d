#include "bind.h"
#include "cpu/divergence.h"
#include "divergence_kinds.h"

namespace py = pybind11;

namespace kdfast {

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
  const NamedKind named = named_kind(kind, a, b);
  call.kind = named.kind;
  call.parameters = named.parameters;
  call.dkd[0] = named.dkd[0];
  call.dkd[1] = named.dkd[1];
  call.zero = named.zero;
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

#include <map>
#include <mutex>

#include "bind.h"
#include "cuda/divergence.h"
#include "cuda/launch.h"
#include "divergence_kinds.h"

namespace py = pybind11;

namespace kdfast {

// Asked once per device: the answer needs a context, and a launch should not.
static cuda::Limits limits(int device) {
  static std::mutex mutex;
  static std::map<int, cuda::Limits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known[device] = cuda::divergence_limits(device);
}

struct CudaOperand {
  std::uintptr_t address;
  int dtype;
  const Ints& strides;
};

static cuda::Divergence make_call(const CudaOperand& student, const CudaOperand& teacher, const Ints& shape, int64_t teacher_width, int64_t dim,
                                  int64_t classes, const std::string& kind, double a, double b, double temperature,
                                  std::uintptr_t row_temperature, const CudaOperand& grad_student, const CudaOperand& grad_teacher) {
  const NamedKind named = named_kind(kind, a, b);
  cuda::Divergence call;
  call.kind = named.kind;
  call.parameters = named.parameters;
  if (named.zero) call.parameters.scale = 0;
  call.rows = make_rows(shape, dim);
  call.student = make_logits(student.address, student.dtype, student.strides, dim, call.rows, "student");
  call.teacher = make_logits(teacher.address, teacher.dtype, teacher.strides, dim, call.rows, "teacher");
  call.grad_student = make_logits(grad_student.address, grad_student.dtype, grad_student.strides, dim, call.rows, "grad_student", true);
  call.grad_teacher = make_logits(grad_teacher.address, grad_teacher.dtype, grad_teacher.strides, dim, call.rows, "grad_teacher", true);
  Logits* const operands[] = {&call.student, &call.teacher, &call.grad_student, &call.grad_teacher};
  merge_axes(call.rows, operands);
  for (const Logits* operand : operands) {
    if (operand->data && operand->class_stride != 1) throw std::invalid_argument("student: the CUDA divergence takes classes side by side");
  }
  if (call.student.dtype != call.teacher.dtype) throw std::invalid_argument("teacher: the CUDA divergence takes one dtype");
  call.classes = classes;
  call.student_width = shape[dim];
  call.teacher_width = teacher_width;
  call.temperature = float(temperature);
  call.row_temperature = pointer<float>(row_temperature);
  return call;
}

static void require(std::uintptr_t address, const char* name) {
  if (!address) throw std::invalid_argument(std::string(name) + ": null address");
}

void bind_cuda_divergence(py::module_& m) {
  m.def("cuda_divergence_most", [](int device, int item) { return cuda::divergence_most(limits(device), item); });
  m.def("cuda_divergence_rows",
        [](std::uintptr_t stream, int device, std::uintptr_t s, int s_dtype, const Ints& s_strides, std::uintptr_t t, int t_dtype,
           const Ints& t_strides, const Ints& shape, int64_t teacher_width, int64_t dim, int64_t classes, const std::string& kind, double a,
           double b, double temperature, std::uintptr_t row_temperature, std::uintptr_t rows, std::uintptr_t stats) {
          const Ints empty;
          cuda::Divergence call = make_call({s, s_dtype, s_strides}, {t, t_dtype, t_strides}, shape, teacher_width, dim, classes, kind, a, b,
                                            temperature, row_temperature, {0, 0, empty}, {0, 0, empty});
          if (call.rows.count == 0) return;
          require(rows, "rows");
          require(stats, "stats");
          call.per_row = true;
          call.kd = pointer<float>(rows);
          call.stats = pointer<float>(stats);
          cuda::divergence_forward(call, limits(device), cuda::stream_of(stream));
        });
  m.def("cuda_divergence_rows_backward",
        [](std::uintptr_t stream, std::uintptr_t s, int s_dtype, const Ints& s_strides, std::uintptr_t t, int t_dtype, const Ints& t_strides,
           const Ints& shape, int64_t teacher_width, int64_t dim, int64_t classes, const std::string& kind, double a, double b,
           double temperature, std::uintptr_t row_temperature, std::uintptr_t grad_rows, std::uintptr_t stats, std::uintptr_t gs, int gs_dtype,
           const Ints& gs_strides, std::uintptr_t gt, int gt_dtype, const Ints& gt_strides) {
          cuda::Divergence call = make_call({s, s_dtype, s_strides}, {t, t_dtype, t_strides}, shape, teacher_width, dim, classes, kind, a, b,
                                            temperature, row_temperature, {gs, gs_dtype, gs_strides}, {gt, gt_dtype, gt_strides});
          if (call.rows.count == 0) return;
          require(grad_rows, "grad_rows");
          require(stats, "stats");
          call.row_weight = pointer<float>(grad_rows);
          call.stats = pointer<float>(stats);
          cuda::divergence_backward(call, cuda::stream_of(stream));
        });
  m.def("cuda_divergence_sum",
        [](std::uintptr_t stream, int device, std::uintptr_t s, int s_dtype, const Ints& s_strides, std::uintptr_t t, int t_dtype,
           const Ints& t_strides, const Ints& shape, int64_t teacher_width, int64_t dim, int64_t classes, const std::string& kind, double a,
           double b, double temperature, std::uintptr_t labels, std::uintptr_t row_temperature, std::uintptr_t row_weight, double kd_factor,
           double ce_factor, double label_smoothing, std::uintptr_t gs, int gs_dtype, const Ints& gs_strides, std::uintptr_t gt, int gt_dtype,
           const Ints& gt_strides, std::uintptr_t kd, std::uintptr_t ce, std::uintptr_t loss, std::uintptr_t parts) {
          cuda::Divergence call = make_call({s, s_dtype, s_strides}, {t, t_dtype, t_strides}, shape, teacher_width, dim, classes, kind, a, b,
                                            temperature, row_temperature, {gs, gs_dtype, gs_strides}, {gt, gt_dtype, gt_strides});
          call.labels = pointer<int64_t>(labels);
          call.row_weight = pointer<float>(row_weight);
          call.kd_factor = float(kd_factor);
          call.ce_factor = float(ce_factor);
          call.label_smoothing = float(label_smoothing);
          call.kd = pointer<float>(kd);
          call.ce = pointer<float>(ce);
          require(loss, "loss");
          require(parts, "parts");
          if (call.rows.count > 0) {
            require(kd, "kd");
            if (ce_factor != 0) require(ce, "ce"), require(labels, "labels");
            cuda::divergence_forward(call, limits(device), cuda::stream_of(stream));
          }
          cuda::divergence_total(call.kd, call.ce, call.rows.count, kd_factor, ce_factor, pointer<float>(loss), pointer<float>(parts),
                                 cuda::stream_of(stream));
        });
}

}  // namespace kdfast

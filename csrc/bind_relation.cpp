#include "bind.h"
#include "cpu/relation.h"

namespace py = pybind11;

namespace kdfast {

void bind_relation(py::module_& m) {
  m.def("relation_rows", [](bool f64, const std::string& compare, std::uintptr_t student, std::uintptr_t teacher, int64_t sets, int64_t rows,
                            int64_t columns, int64_t first_row, double student_scale, double teacher_scale, std::uintptr_t mask, bool diagonal,
                            std::uintptr_t weight, int64_t weight_stride, bool need_student, bool need_teacher, std::uintptr_t out,
                            int64_t out_stride) {
    if (!student || !teacher || !out) throw std::invalid_argument("student: null address");
    if ((need_student || need_teacher) && !weight) throw std::invalid_argument("weight: null address");
    RelationRows call;
    call.f64 = f64;
    call.compare = compare == "gram" ? Compare::gram : Compare::softmax;
    call.student = pointer<void>(student);
    call.teacher = pointer<void>(teacher);
    call.sets = sets;
    call.rows = rows;
    call.columns = columns;
    call.first_row = first_row;
    call.student_scale = student_scale;
    call.teacher_scale = teacher_scale;
    call.mask = pointer<uint8_t>(mask);
    call.diagonal = diagonal;
    call.weight = pointer<void>(weight);
    call.weight_stride = weight_stride;
    call.need_student = need_student;
    call.need_teacher = need_teacher;
    call.out = pointer<void>(out);
    call.out_stride = out_stride;
    py::gil_scoped_release release;
    KD_CALL(relation_rows, call);
  });
  m.def("contrast_rows", [](bool f64, std::uintptr_t scores, int64_t rows, int64_t columns, int64_t first_row, double scale,
                            std::uintptr_t positive, bool exclude_self, std::uintptr_t out, std::uintptr_t lse, bool unit_gradient,
                            std::uintptr_t grad_rows) {
    if (!scores || !positive || !lse || (!out && !grad_rows)) throw std::invalid_argument("scores: null address");
    ContrastRows call;
    call.f64 = f64;
    call.scores = pointer<void>(scores);
    call.rows = rows;
    call.columns = columns;
    call.first_row = first_row;
    call.scale = scale;
    call.positive = pointer<int64_t>(positive);
    call.exclude_self = exclude_self;
    call.out = pointer<void>(out);
    call.lse = pointer<void>(lse);
    call.unit_gradient = unit_gradient;
    call.grad_rows = pointer<void>(grad_rows);
    py::gil_scoped_release release;
    KD_CALL(contrast_rows, call);
  });
}

}  // namespace kdfast

// Rows of score tables that were just made by a matrix product, compared and turned into gradients in place, in cache.
#pragma once

#include <cstdint>

#include "isa.h"

namespace kdfast {

enum class Compare : int { gram = 0, softmax = 1 };

// Tables [sets, rows, columns], dense. Row r of a set is token first_row + r, column c token c.
struct RelationRows {
  bool f64 = false;
  Compare compare = Compare::softmax;
  void* student = nullptr;             // products; then dL/d product, if need_student
  void* teacher = nullptr;
  int64_t sets = 0, rows = 0, columns = 0, first_row = 0;
  double student_scale = 1, teacher_scale = 1;
  const uint8_t* mask = nullptr;       // [sets, columns], 1: keep; null: all
  bool diagonal = true;
  const void* weight = nullptr;        // row r of set b at b * weight_stride + r; null: no gradient
  int64_t weight_stride = 0;
  bool need_student = false, need_teacher = false;
  void* out = nullptr;                 // row r of set b at b * out_stride + r
  int64_t out_stride = 0;
};

// InfoNCE: scores = scale * products of rows [first_row, ..) with all columns; p = softmax, without the own column on demand.
struct ContrastRows {
  bool f64 = false;
  void* scores = nullptr;              // [rows, columns], dense; then the gradient, if asked
  int64_t rows = 0, columns = 0, first_row = 0;
  double scale = 1;
  const int64_t* positive = nullptr;   // [rows]
  bool exclude_self = false;
  void* out = nullptr;                 // forward: [rows]
  void* lse = nullptr;                 // forward: out [rows]; backward: in
  bool unit_gradient = false;          // forward: scores become (p - onehot) scale
  const void* grad_rows = nullptr;     // backward: scores become grad (p - onehot) scale
};

KD_PER_ISA(void relation_rows(const RelationRows& call))
KD_PER_ISA(void contrast_rows(const ContrastRows& call))

}  // namespace kdfast

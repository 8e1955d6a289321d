// Divergences over rows of logits: the calls bind_divergence.cpp makes. Formulas: csrc/divergence_terms.h.
#pragma once

#include "isa.h"
#include "logits.h"

#include "divergence_terms.h"

namespace kdfast {

// Per-row scalars kept between passes (and by Python for the backward), [kStats, rows]: for student and teacher the largest
// logit and the log-sum-exp of x or z above it (one number for both would cost a row near 1e4 four digits); the gap that makes
// d of z - x (far_apart); sum v; sum u.
constexpr int kStats = 7;

struct DivergenceCall {
  Kind kind;
  KindParameters parameters;
  double dkd[2] = {1, 1};                // target and non-target weight
  bool zero = false;                     // skew with beta = 1: identically 0
  Logits student, teacher, grad_student, grad_teacher;
  Rows rows;
  int64_t classes = 0;                   // compared
  int64_t student_width = 0, teacher_width = 0;
  double temperature = 1;
  const int64_t* labels = nullptr;       // [rows]
  // In the compute type (float, or double when `f64`), [rows]:
  bool f64 = false;
  const void* row_temperature = nullptr;
  const void* row_weight = nullptr;      // null: 1
  const void* grad_rows = nullptr;       // backward only
  void* out_rows = nullptr;              // rows entry
  void* stats = nullptr;                 // rows entry: out; backward: in
  // sum entry: loss = kd_factor * sum w D + ce_factor * sum w CE; partial sums per block of rows, added by the caller
  double kd_factor = 1, ce_factor = 0, label_smoothing = 0;
  double* partial_kd = nullptr;
  double* partial_ce = nullptr;
  bool stream = false;                   // the gradient is far larger than the caches
  Status* status = nullptr;
};

// Rows are cut into blocks by shape and strides alone, so sums do not depend on the number of threads. `partial_*` has room
// for as many as divergence_blocks says.
KD_PER_ISA(int64_t divergence_blocks(const DivergenceCall& call); void divergence_run(const DivergenceCall& call))

}  // namespace kdfast

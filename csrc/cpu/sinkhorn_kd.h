// What SinKD's loss needs around the transport problem: softened rows, and the way back through them.
#pragma once

#include "isa.h"
#include "logits.h"

namespace kdfast {

struct SoftRows {
  Logits logits;
  Rows rows;
  int64_t width = 0;
  bool f64 = false;
  double inverse_t = 1;
  const uint8_t* mask = nullptr;  // [rows], 0 = not read; null: all
  Bad bad = Bad::student;         // how a NaN or +inf is reported
  Status* status = nullptr;
  void* probs = nullptr;          // [rows, width] softmax(logits / T), zeros in a row that is masked or only -inf
  void* kept = nullptr;           // [rows] 1 or 0
  // backward: grad_logits = factor / T p (grad - <grad, p>)
  const void* grad = nullptr;     // [rows, width]
  double factor = 1;
  Logits grad_logits;
};

KD_PER_ISA(void soften(const SoftRows& call))
KD_PER_ISA(void soften_backward(const SoftRows& call))
// Squared distances to distances in place; and their gradient, in place, to that of the squares: g / (2 w), 0 where w = 0.
KD_PER_ISA(void roots(void* w, int64_t count, bool f64))
KD_PER_ISA(void root_gradients(const void* w, void* g, int64_t count, bool f64))

}  // namespace kdfast

// Selective KL over two logit maps (kdfast.ops.selective): the call bind_selective.cpp makes.
#pragma once

#include "isa.h"
#include "logits.h"

namespace kdfast {

struct SelectiveCall {
  Logits a, b, grad_a, grad_b;      // gradients: null when nobody asked
  Rows rows;                        // the pixels
  int64_t classes = 0;
  const int64_t* labels = nullptr;  // [pixels]
  int64_t ignore_index = 255;
  double temperature = 1;
  bool entropy = false;             // reliability: entropy of the own softmax, else cross-entropy with the label
  bool f64 = false;                 // compute type: double if a map is
  bool stream = false;              // gradients larger than any cache
  double scale_a = 1, scale_b = 1;  // stored gradient = scale (p_student - p_teacher)
  // [pixels]; the reliabilities in the compute type
  int8_t* direction = nullptr;
  bool* valid = nullptr;
  void* reliability_a = nullptr;
  void* reliability_b = nullptr;
  // Per block, added in block order by the caller: sums of KL [blocks, 2] and counts of valid, to a, to b [blocks, 3].
  double* loss = nullptr;
  int64_t* count = nullptr;
  Status* status = nullptr;
};

// A block of pixels is a tile: at most 64 KB (float) of each map where it can be, so that three of them stay in L2, and a whole
// number of vectors of every instruction set. Cut by shape alone, so that sums do not depend on the threads.
static inline int64_t selective_tile(int64_t classes) {
  const int64_t pixels = 16384 / classes / 16 * 16;
  return pixels < 16 ? 16 : pixels > 256 ? 256 : pixels;
}
static inline int64_t selective_blocks(const SelectiveCall& call) {
  const int64_t tile = selective_tile(call.classes);
  return (call.rows.count + tile - 1) / tile;
}

KD_PER_ISA(void selective_run(const SelectiveCall& call))

}  // namespace kdfast

// Divergences on a GPU, one cluster of blocks per row: the calls bind_cuda_divergence.cpp makes. Formulas: csrc/divergence_terms.h.
#pragma once

#include <cuda_runtime.h>

#include "divergence_terms.h"
#include "logits.h"

namespace kdfast {
namespace cuda {

// Arrays per row are float [rows]. Student and teacher have one dtype, of 16 or 32 bits; classes lie side by side.
struct Divergence {
  Kind kind;
  KindParameters parameters;
  Rows rows;
  Logits student, teacher, grad_student, grad_teacher;  // a gradient's dtype: the logits' or f32
  int64_t classes = 0, student_width = 0, teacher_width = 0;
  float temperature = 1;
  const float* row_temperature = nullptr;
  const float* row_weight = nullptr;  // backward: the upstream gradient. null: 1
  const int64_t* labels = nullptr;    // cross-entropy's; read where ce_factor is not 0
  float kd_factor = 1, ce_factor = 0, label_smoothing = 0;
  bool per_row = false;               // rows entry: `kd` holds D and `stats` is written; else the weighted terms of the sum
  float *kd = nullptr, *ce = nullptr;
  float* stats = nullptr;             // [7, rows] as in kdfast/ops/divergence.py, gap +inf for a row of NaN, NaN for an ignored one
};

// Blocks per row, classes of a block, bytes of its shared memory, whether whole packs can be read.
struct DivergencePlan {
  int cluster = 1, per_block = 0;
  std::size_t shared = 0;
  bool wide = false;
};

// What the device allows: of one block's shared memory, of a cluster's blocks.
struct Limits {
  int shared_bytes = 0, cluster = 0;  // cluster 0: none at all
};
Limits divergence_limits(int device);

// The longest row that fits, in classes of `item` bytes each for student and teacher.
int64_t divergence_most(const Limits& limits, int item);

void divergence_forward(const Divergence& call, const Limits& limits, cudaStream_t stream);
void divergence_backward(const Divergence& call, cudaStream_t stream);  // from `stats`

// loss = kd_factor * sum kd + ce_factor * sum ce, and (sum kd, sum ce), added in a fixed order.
void divergence_total(const float* kd, const float* ce, int64_t rows, double kd_factor, double ce_factor, float* loss, float* parts,
                      cudaStream_t stream);

}  // namespace cuda
}  // namespace kdfast

// Routing: scores with top-k, plans by counting sort, and the moves of rows. Formulas and meaning: kdfast/ops/routing.py and
// kdfast/ops/routing_plan.py.
#pragma once

#include "isa.h"
#include "logits.h"

namespace kdfast {

enum class Score : int { softmax_after_topk = 0, softmax = 1, sigmoid = 2, sqrt_softplus = 3, logits = 4, mean = 5 };

struct ScoreCall {
  bool f64 = false;  // compute type double: of bias, weights, lse, mean_probs and their gradients
  const void* logits = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t rows = 0, experts = 0, row_stride = 0, expert_stride = 0;
  int64_t k = 1, groups = 1, topk_groups = 1;
  Score score = Score::softmax_after_topk;
  double norm = 0;  // q, 0: not normalised
  double eps = 0, scale = 1;
  const void* bias = nullptr;     // [E]
  const uint8_t* mask = nullptr;  // [N], 0 = row not read
  int32_t* ids = nullptr;         // [N, k]
  void* weights = nullptr;        // [N, k]
  void* lse = nullptr;            // [N]
  int32_t* alive = nullptr;       // [N] slots whose selection score is not -inf: the first ones
  // Rows are cut into blocks by shape alone; each block leaves its sums here, added in block order afterwards.
  int32_t* partial_counts = nullptr;  // [blocks, E]
  void* partial_probs = nullptr;      // [blocks, E]
  Status* status = nullptr;           // null: bad rows become NaN instead
  // backward
  const void* grad_weights = nullptr;  // [N, k] or null
  const void* grad_mean = nullptr;     // [E] or null
  const void* grad_lse = nullptr;      // [N] or null
  void* grad_logits = nullptr;         // [N, E] contiguous, dtype of the logits
  int64_t kept = 0;                    // rows with mask
};

int64_t score_block(int64_t rows);  // rows per block

struct PlanCall {
  const int32_t* ids = nullptr;   // [N, k]
  const uint8_t* keep = nullptr;  // [N, k], 0 = dropped from the start; null: all kept
  int64_t rows = 0, k = 1, experts = 1, block = 64;
  int64_t capacity = 0;  // 0: none
  bool choice = false;   // ranks in choice order
  int32_t *order = nullptr, *inverse = nullptr, *counts = nullptr, *offsets = nullptr, *position = nullptr, *row_slot = nullptr,
          *block_expert = nullptr, *padded_offsets = nullptr;
  int64_t row_slots = 0, blocks = 0;  // lengths of row_slot and block_expert
  int32_t* histogram = nullptr;       // [slot blocks, E + 1] scratch
  Status* status = nullptr;           // null: an id outside counts as dropped
};

int64_t plan_block(int64_t slots);  // slots per block

struct MoveCall {
  bool f64 = false;  // weights and sums in double
  Dtype dtype = Dtype::f32;
  int64_t tokens = 0, k = 1, width = 0;
  const void* x = nullptr;  // [tokens, H], or [M, H] for combine; contiguous, as every tensor here
  void* out = nullptr;
  const int32_t* order = nullptr;    // gather: rows [begin, end) of it
  int64_t begin = 0, end = 0;
  const int32_t* inverse = nullptr;  // [tokens, k]
  const void* weights = nullptr;     // [tokens, k] or null
  const void* grad = nullptr;        // combine backward: dy [tokens, H]
  void* grad_weights = nullptr;      // [tokens, k] or null
  int64_t total_rows = 0;            // M
};

KD_PER_ISA(void score_forward(const ScoreCall& call); void score_backward(const ScoreCall& call); void plan_run(const PlanCall& call);
           void move_gather(const MoveCall& call); void move_combine(const MoveCall& call);
           void move_combine_backward(const MoveCall& call))

}  // namespace kdfast

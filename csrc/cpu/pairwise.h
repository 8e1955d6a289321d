// Costs between all pairs of two point sets, sum_c |x_ic - y_jc|^p, p = 1 or 2, and their gradients.
#pragma once

#include "isa.h"
#include "logits.h"

namespace kdfast {

// [batch, rows, width] of any storage type and strides (in elements).
struct PointSet {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t batch_stride = 0, row_stride = 0, column_stride = 1;
  int64_t rows = 0;
};

struct PairwiseCost {
  PointSet x, y;
  int64_t batch = 0, width = 0;
  int p = 1;
  bool f64 = false;            // compute type double, else float
  void* cost = nullptr;        // forward: [batch, N, M], dense, compute type
  int64_t chunks = 1;          // forward: the width is cut into so many parts, each summed by one task
  void* partial = nullptr;     // forward, chunks > 1: [chunks, batch, N, M], compute type
  const void* grad = nullptr;  // backward: upstream gradient [batch, N, M] of the compute type
  int64_t grad_strides[3] = {};
  PointSet grad_x;             // backward: output, dense rows; x and y swapped give the other one
};

// Tiles of one task. Two staged panels of kColumns columns (96 rows) stay in L2.
constexpr int kTileRows = 32, kTileOthers = 64, kColumns = 512;

// Parts of the width: enough tasks for the threads when there are few pairs. By shape alone, so sums are reproducible.
int64_t pairwise_chunks(int64_t batch, int64_t n, int64_t m, int64_t width);

KD_PER_ISA(void pairwise_cost(const PairwiseCost& call))
KD_PER_ISA(void pairwise_cost_backward(const PairwiseCost& call))

}  // namespace kdfast

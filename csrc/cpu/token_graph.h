// Token graphs: k nearest neighbours from blocks of a Gram matrix, exact distances, and gradients by gathering.
// Matrix products are the caller's. Tokens are dense [n, width] of the compute type (float, or double when `f64`).
// `inverse` [n], if not null, scales token i: the graph of normalised tokens without a normalised copy.
#pragma once

#include <cstdint>

#include "isa.h"

namespace kdfast {

// Candidates of token i: the C tokens j with the smallest keys N_j - 2 <x_i, x_j>, sorted by (key, id). N_j is the squared
// norm, shrunk by the error bound of the product, so key + N_i never exceeds the true squared distance.
struct GraphSelect {
  bool f64 = false;
  const void* gram = nullptr;   // [rows, columns]: row r is token first + r, column c is token first + c
  int64_t first = 0, rows = 0, columns = 0;
  const void* norms = nullptr;  // [n], shrunk
  int candidates = 0;
  void* keys = nullptr;         // [n, C]
  int32_t* ids = nullptr;       // [n, C]
  int32_t* counts = nullptr;    // [n]
};

struct GraphRank {
  bool f64 = false;
  const void* tokens = nullptr;
  const void* inverse = nullptr;
  int64_t n = 0, width = 0, k = 0;
  int candidates = 0;           // 0: none, every row looks at all tokens
  const void* norms = nullptr;
  const void* keys = nullptr;
  const int32_t* ids = nullptr;
  const int32_t* counts = nullptr;
  double slack = 0;             // relative error bound of a directly computed distance
  double sigma = 1;
  int32_t* neighbours = nullptr;  // [n, k], nearest first, ties: lower index
  void* weights = nullptr;        // [n, k]
};

struct EdgeWeights {
  bool f64 = false;
  const void* tokens = nullptr;
  const void* inverse = nullptr;
  int64_t width = 0, edges = 0;
  const int32_t* sources = nullptr;
  const int32_t* targets = nullptr;
  double sigma = 1;
  void* weights = nullptr;
};

// Every edge stands in the lists of both its ends, so a token's gradient is a gather in fixed order: no atomics.
struct EdgeGradient {
  bool f64 = false;
  const void* tokens = nullptr;
  const void* inverse = nullptr;
  int64_t n = 0, width = 0;
  const int64_t* starts = nullptr;   // [n + 1]
  const int32_t* others = nullptr;   // the edge's other end
  const int32_t* edges = nullptr;    // its number
  const void* weights = nullptr;     // [edges]
  const void* grad_weights = nullptr;
  double sigma = 1;
  double largest_inverse = 0;        // a token whose norm is below the floor: scaled by a constant
  void* grad = nullptr;              // [n, width]
};

KD_PER_ISA(void graph_select(const GraphSelect& call))
KD_PER_ISA(void graph_rank(const GraphRank& call))
KD_PER_ISA(void edge_weights(const EdgeWeights& call))
KD_PER_ISA(void edge_gradient(const EdgeGradient& call))

// Rows of a sparse matrix of weights, columns ascending within a row.
struct SparseRows {
  const int64_t* starts = nullptr;  // [n + 1]
  const int32_t* columns = nullptr;
  const int32_t* edges = nullptr;   // where the entry stands in the weights
  const void* weights = nullptr;
  void* grad = nullptr;             // null: not asked for
};

// KL of the row softmaxes of two n x n matrices that are zero off their entries (absent entries count as exp(0) = 1).
struct SparseKL {
  bool f64 = false, teacher_first = false;
  int64_t n = 0;
  SparseRows student, teacher;
  const void* grad_rows = nullptr;  // backward
  void* rows = nullptr;             // forward
};

void sparse_softmax_kl(const SparseKL& call);  // scalar arithmetic in double: one copy for all instruction sets

}  // namespace kdfast

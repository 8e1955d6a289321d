// KL between the row softmaxes of two sparse weight matrices. With U the union of a row's entries in both, A = 0 off them:
//   Z = n + sum expm1(A)        c = log Z' - log Z = log1p(sum_U e^A expm1(A' - A) / Z)        d = log P - log Q = A - A' + c
//   KL = sum_U P phi(d) + (n - |U|) phi(c) / Z,   phi(d) = d + e^-d - 1 >= 0
// (unprimed: the first argument of the KL). All terms are non-negative, so near agreement keeps its digits.
//   dKL/dA_j = P_j (d_j - KL)        dKL/dA'_j = Q_j - P_j = P_j expm1(-d_j)
#include <cmath>
#include <vector>

#include "cpu/token_graph.h"
#include "parallel.h"

namespace kdfast {

static double phi(double d) {
  if (std::abs(d) < 1e-3) return d * d * (0.5 - d * (1.0 / 6 - d * (1.0 / 24 - d / 120)));  // d + e^-d - 1 would cancel
  return d + std::expm1(-d);
}

struct Entry {
  double a, b;              // weights in the first and the second matrix, 0 where absent
  int64_t a_edge, b_edge;   // their numbers, -1 where absent
};

template <class T>
static void merge_row(const SparseRows& first, const SparseRows& second, int64_t row, std::vector<Entry>& out) {
  const T* a = static_cast<const T*>(first.weights);
  const T* b = static_cast<const T*>(second.weights);
  out.clear();
  int64_t i = first.starts[row], j = second.starts[row];
  const int64_t i_end = first.starts[row + 1], j_end = second.starts[row + 1];
  while (i < i_end || j < j_end) {
    const int64_t at_i = i < i_end ? first.columns[i] : INT64_MAX, at_j = j < j_end ? second.columns[j] : INT64_MAX;
    Entry entry{0, 0, -1, -1};
    if (at_i <= at_j) {
      entry.a_edge = first.edges[i++];
      entry.a = double(a[entry.a_edge]);
    }
    if (at_j <= at_i) {
      entry.b_edge = second.edges[j++];
      entry.b = double(b[entry.b_edge]);
    }
    out.push_back(entry);
  }
}

template <class T>
static void run(const SparseKL& call) {
  const SparseRows& first = call.teacher_first ? call.teacher : call.student;
  const SparseRows& second = call.teacher_first ? call.student : call.teacher;
  parallel_for(call.n, 64, [&](int64_t begin, int64_t end) {
    std::vector<Entry> entries;
    for (int64_t row = begin; row < end; ++row) {
      merge_row<T>(first, second, row, entries);
      double z = double(call.n), moved = 0;
      for (const Entry& e : entries) {
        z += std::expm1(e.a);
        moved += std::exp(e.a) * std::expm1(e.b - e.a);
      }
      const double c = std::log1p(moved / z);
      double kl = double(call.n - int64_t(entries.size())) * phi(c) / z;
      for (const Entry& e : entries) kl += std::exp(e.a) / z * phi(e.a - e.b + c);
      if (call.rows) static_cast<T*>(call.rows)[row] = T(kl);
      if (!call.grad_rows) continue;
      const double up = double(static_cast<const T*>(call.grad_rows)[row]);
      for (const Entry& e : entries) {
        const double p = std::exp(e.a) / z, d = e.a - e.b + c;
        if (first.grad && e.a_edge >= 0) static_cast<T*>(first.grad)[e.a_edge] = T(up * p * (d - kl));
        if (second.grad && e.b_edge >= 0) static_cast<T*>(second.grad)[e.b_edge] = T(up * p * std::expm1(-d));
      }
    }
  });
}

void sparse_softmax_kl(const SparseKL& call) { call.f64 ? run<double>(call) : run<float>(call); }

}  // namespace kdfast

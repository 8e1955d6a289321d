#include "bind.h"
#include "cpu/token_graph.h"

namespace py = pybind11;

namespace kdfast {

// Edges (row, column) as lists per row, columns ascending: two stable counting sorts, by column, then by row.
struct EdgeLists {
  std::vector<int64_t> starts;
  std::vector<int32_t> columns, edges;

  EdgeLists(const int32_t* rows, const int32_t* cols, int64_t count, int64_t n) {
    const std::vector<int32_t> by_column = sorted(cols, nullptr, count, n);
    edges = sorted(rows, by_column.data(), count, n, &starts);
    columns.resize(std::size_t(count));
    for (int64_t i = 0; i < count; ++i) {
      columns[i] = cols[edges[i]];
      if (i > 0 && columns[i] == columns[i - 1] && rows[edges[i]] == rows[edges[i - 1]]) {
        throw std::invalid_argument("edges: expected each edge once, got (" + std::to_string(rows[edges[i]]) + ", " +
                                    std::to_string(columns[i]) + ") twice");
      }
    }
  }

  // Edge numbers in stable order of keys[edge], taken from `order` (null: 0, 1, 2, ...).
  static std::vector<int32_t> sorted(const int32_t* keys, const int32_t* order, int64_t count, int64_t n,
                                     std::vector<int64_t>* out_starts = nullptr) {
    std::vector<int64_t> starts(std::size_t(n) + 1, 0);
    for (int64_t e = 0; e < count; ++e) {
      if (keys[e] < 0 || keys[e] >= n) throw std::invalid_argument("edges: expected node numbers in [0, " + std::to_string(n) + ")");
      ++starts[keys[e] + 1];
    }
    for (int64_t i = 0; i < n; ++i) starts[i + 1] += starts[i];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    std::vector<int32_t> result(static_cast<std::size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      const int32_t e = order ? order[i] : int32_t(i);
      result[next[keys[e]]++] = e;
    }
    if (out_starts) *out_starts = std::move(starts);
    return result;
  }
};

static SparseRows make_rows(const EdgeLists& lists, std::uintptr_t weights, std::uintptr_t grad) {
  SparseRows rows;
  rows.starts = lists.starts.data();
  rows.columns = lists.columns.data();
  rows.edges = lists.edges.data();
  rows.weights = pointer<void>(weights);
  rows.grad = pointer<void>(grad);
  return rows;
}

void bind_token_graph(py::module_& m) {
  m.def("graph_select", [](bool f64, std::uintptr_t gram, int64_t first, int64_t rows, int64_t columns, std::uintptr_t norms, int candidates,
                           std::uintptr_t keys, std::uintptr_t ids, std::uintptr_t counts) {
    if (!gram || !norms || !keys || !ids || !counts) throw std::invalid_argument("gram: null address");
    GraphSelect call{f64,        pointer<void>(gram), first,                  rows,                  columns, pointer<void>(norms),
                     candidates, pointer<void>(keys), pointer<int32_t>(ids), pointer<int32_t>(counts)};
    py::gil_scoped_release release;
    KD_CALL(graph_select, call);
  });
  m.def("graph_rank", [](bool f64, std::uintptr_t tokens, std::uintptr_t inverse, int64_t n, int64_t width, int64_t k, int candidates, std::uintptr_t norms,
                         std::uintptr_t keys, std::uintptr_t ids, std::uintptr_t counts, double slack, double sigma,
                         std::uintptr_t neighbours, std::uintptr_t weights) {
    if (!tokens || !neighbours || !weights) throw std::invalid_argument("tokens: null address");
    if (candidates && (!norms || !keys || !ids || !counts)) throw std::invalid_argument("norms: null address");
    GraphRank call{f64,  pointer<void>(tokens), pointer<void>(inverse), n,     width, k, candidates, pointer<void>(norms), pointer<void>(keys), pointer<int32_t>(ids),
                   pointer<int32_t>(counts), slack, sigma, pointer<int32_t>(neighbours), pointer<void>(weights)};
    py::gil_scoped_release release;
    KD_CALL(graph_rank, call);
  });
  m.def("edge_weights", [](bool f64, std::uintptr_t tokens, std::uintptr_t inverse, int64_t width, int64_t edges, std::uintptr_t sources, std::uintptr_t targets,
                           double sigma, std::uintptr_t weights) {
    if (!tokens || !sources || !targets || !weights) throw std::invalid_argument("tokens: null address");
    EdgeWeights call{f64, pointer<void>(tokens), pointer<void>(inverse), width, edges, pointer<int32_t>(sources), pointer<int32_t>(targets), sigma, pointer<void>(weights)};
    py::gil_scoped_release release;
    KD_CALL(edge_weights, call);
  });
  m.def("edge_gradient", [](bool f64, std::uintptr_t tokens, std::uintptr_t inverse, double largest_inverse, int64_t n, int64_t width, int64_t edges, std::uintptr_t sources,
                            std::uintptr_t targets, std::uintptr_t weights, std::uintptr_t grad_weights, double sigma, std::uintptr_t grad) {
    if (!tokens || !grad) throw std::invalid_argument("tokens: null address");
    py::gil_scoped_release release;
    // Each edge in the lists of both ends: edge e as entry e (seen from its source) and entry edges + e (from its target).
    std::vector<int32_t> ends(std::size_t(2 * edges));
    std::copy_n(pointer<int32_t>(sources), edges, ends.data());
    std::copy_n(pointer<int32_t>(targets), edges, ends.data() + edges);
    std::vector<int64_t> starts;
    std::vector<int32_t> order = EdgeLists::sorted(ends.data(), nullptr, 2 * edges, n, &starts), others(std::size_t(2 * edges));
    for (int64_t i = 0; i < 2 * edges; ++i) {
      const int32_t entry = order[i];
      others[i] = entry < edges ? ends[entry + edges] : ends[entry - edges];
      order[i] = int32_t(entry < edges ? entry : entry - edges);
    }
    EdgeGradient call;
    call.f64 = f64;
    call.tokens = pointer<void>(tokens);
    call.inverse = pointer<void>(inverse);
    call.largest_inverse = largest_inverse;
    call.n = n;
    call.width = width;
    call.starts = starts.data();
    call.others = others.data();
    call.edges = order.data();
    call.weights = pointer<void>(weights);
    call.grad_weights = pointer<void>(grad_weights);
    call.sigma = sigma;
    call.grad = pointer<void>(grad);
    advise_huge(call.grad, std::size_t(n * width) * (f64 ? 8 : 4));
    KD_CALL(edge_gradient, call);
  });
  m.def("sparse_softmax_kl",
        [](bool f64, bool teacher_first, int64_t n, int64_t student_edges, std::uintptr_t student_rows, std::uintptr_t student_columns,
           std::uintptr_t student_weights, int64_t teacher_edges, std::uintptr_t teacher_rows, std::uintptr_t teacher_columns,
           std::uintptr_t teacher_weights, std::uintptr_t rows, std::uintptr_t grad_rows, std::uintptr_t grad_student,
           std::uintptr_t grad_teacher) {
          py::gil_scoped_release release;
          const EdgeLists student(pointer<int32_t>(student_rows), pointer<int32_t>(student_columns), student_edges, n);
          const EdgeLists teacher(pointer<int32_t>(teacher_rows), pointer<int32_t>(teacher_columns), teacher_edges, n);
          SparseKL call;
          call.f64 = f64;
          call.teacher_first = teacher_first;
          call.n = n;
          call.student = make_rows(student, student_weights, grad_student);
          call.teacher = make_rows(teacher, teacher_weights, grad_teacher);
          call.rows = pointer<void>(rows);
          call.grad_rows = pointer<void>(grad_rows);
          sparse_softmax_kl(call);
        });
}

}  // namespace kdfast

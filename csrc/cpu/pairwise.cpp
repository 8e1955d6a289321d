// One task owns a tile of kTileRows x kTileOthers pairs (and, with few pairs, a part of the width). It walks the columns in
// panels: both panels are staged in the compute type, zero-padded to whole vectors (|0 - 0| adds nothing), then every row
// meets every other row while they are in cache. So x is read N-tile times less often than in a plain double loop, and no
// N x M x C buffer exists. Sums run over 512 columns in lanes, then over panels: the error grows with the root of the width.
#include "cpu/pairwise.h"

#include "cpu/stage.h"
#include "memory.h"
#include "parallel.h"

namespace kdfast {
namespace KD_ISA {
namespace {

constexpr int kNarrow = 64;  // up to this width lanes run along the other set's rows, not along the columns

KD_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
KD_INLINE int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// rows x columns of a set into out[row][stride], compute type, zeros up to `padded` columns.
template <class T>
static void stage_panel(const PointSet& set, int64_t batch, int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t padded,
                        T* out, int64_t stride) {
  Logits view;
  view.data = set.data;
  view.dtype = set.dtype;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t offset = batch * set.batch_stride + (row + i) * set.row_stride + column * set.column_stride;
    load_logits(view, offset, set.column_stride, columns, out + i * stride);
    for (int64_t c = columns; c < padded; ++c) out[i * stride + c] = T(0);
  }
}

template <class T, int P>
KD_INLINE Vec<T> term(Vec<T> difference) {
  if constexpr (P == 1) return vabs<T>(difference);
  return difference * difference;
}

// sums[i][j] += sum over `columns` (whole vectors) of the term, for an R x S tile at x, y.
template <class T, int P, int R, int S>
KD_INLINE void tile(const T* x, const T* y, int64_t columns, T* sums) {
  Vec<T> total[R][S];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < S; ++j) total[i][j] = Vec<T>{};
  for (int64_t c = 0; c < columns; c += kWidth<T>) {
    Vec<T> a[R], b[S];
    for (int i = 0; i < R; ++i) a[i] = load(x + i * kColumns + c);
    for (int j = 0; j < S; ++j) b[j] = load(y + j * kColumns + c);
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < S; ++j) total[i][j] += term<T, P>(a[i] - b[j]);
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < S; ++j) sums[i * kTileOthers + j] += sum_lanes<T>(total[i][j]);
}

template <class T, int P>
static void wide_tile(const PairwiseCost& call, int64_t batch, int64_t i0, int64_t rows, int64_t j0, int64_t others, int64_t begin,
                      int64_t end, T* x, T* y, T* sums) {
  constexpr int R = 4, S = KD_VECTOR_BYTES == 64 ? 4 : 2;
  // Whole register tiles: the rows past the end repeat the last values of the buffer and are not stored.
  const int64_t all_rows = blocks_of(rows, R) * R, all_others = blocks_of(others, S) * S;
  for (int64_t c = begin; c < end; c += kColumns) {
    const int64_t columns = least(kColumns, end - c), padded = blocks_of(columns, kWidth<T>) * kWidth<T>;
    stage_panel(call.x, batch, i0, rows, c, columns, padded, x, kColumns);
    stage_panel(call.y, batch, j0, others, c, columns, padded, y, kColumns);
    for (int64_t i = rows; i < all_rows; ++i) std::memset(x + i * kColumns, 0, sizeof(T) * std::size_t(padded));
    for (int64_t j = others; j < all_others; ++j) std::memset(y + j * kColumns, 0, sizeof(T) * std::size_t(padded));
    for (int64_t i = 0; i < rows; i += R)
      for (int64_t j = 0; j < others; j += S) tile<T, P, R, S>(x + i * kColumns, y + j * kColumns, padded, sums + i * kTileOthers + j);
  }
}

// Lanes along j: y is staged transposed, [width][kTileOthers].
template <class T, int P>
static void narrow_tile(const PairwiseCost& call, int64_t batch, int64_t i0, int64_t rows, int64_t j0, int64_t others, T* x, T* y, T* sums) {
  const int64_t width = call.width;
  T line[kNarrow];
  for (int64_t j = 0; j < others; ++j) {
    stage_panel(call.y, batch, j0 + j, 1, 0, width, width, line, kNarrow);
    for (int64_t c = 0; c < width; ++c) y[c * kTileOthers + j] = line[c];
  }
  const int64_t all = blocks_of(others, kWidth<T>) * kWidth<T>;
  for (int64_t c = 0; c < width; ++c)
    for (int64_t j = others; j < all; ++j) y[c * kTileOthers + j] = T(0);
  stage_panel(call.x, batch, i0, rows, 0, width, width, x, kNarrow);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < others; j += kWidth<T>) {
      Vec<T> total{};
      for (int64_t c = 0; c < width; ++c) total += term<T, P>(splat(x[i * kNarrow + c]) - load(y + c * kTileOthers + j));
      store(sums + i * kTileOthers + j, total);
    }
  }
}

template <class T, int P>
static void forward(const PairwiseCost& call) {
  const int64_t n = call.x.rows, m = call.y.rows;
  const int64_t row_tiles = blocks_of(n, kTileRows), other_tiles = blocks_of(m, kTileOthers);
  const int64_t tasks = call.batch * row_tiles * other_tiles * call.chunks;
  const int64_t chunk_width = blocks_of(blocks_of(call.width, call.chunks), kColumns) * kColumns;
  const int64_t work = least(n, kTileRows) * least(m, kTileOthers) * least(call.width, chunk_width);
  parallel_for(tasks, blocks_of(65536, work ? work : 1), [&](int64_t begin, int64_t end) {
    T* x = static_cast<T*>(thread_scratch(0, sizeof(T) * ((kTileRows + kTileOthers) * kColumns + kTileRows * kTileOthers)));
    T* y = x + kTileRows * kColumns;
    T* sums = y + kTileOthers * kColumns;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task % call.chunks, at = task / call.chunks;
      const int64_t j0 = at % other_tiles * kTileOthers, i0 = at / other_tiles % row_tiles * kTileRows;
      const int64_t batch = at / (other_tiles * row_tiles);
      const int64_t rows = least(kTileRows, n - i0), others = least(kTileOthers, m - j0);
      if (call.width <= kNarrow) {
        narrow_tile<T, P>(call, batch, i0, rows, j0, others, x, y, sums);
      } else {
        std::memset(sums, 0, sizeof(T) * kTileRows * kTileOthers);
        wide_tile<T, P>(call, batch, i0, rows, j0, others, chunk * chunk_width, least(call.width, (chunk + 1) * chunk_width), x, y, sums);
      }
      T* out = call.chunks > 1 ? static_cast<T*>(call.partial) + chunk * call.batch * n * m : static_cast<T*>(call.cost);
      for (int64_t i = 0; i < rows; ++i)
        std::memcpy(out + (batch * n + i0 + i) * m + j0, sums + i * kTileOthers, sizeof(T) * std::size_t(others));
    }
  });
  if (call.chunks == 1) return;
  const T* partial = static_cast<const T*>(call.partial);
  T* cost = static_cast<T*>(call.cost);
  const int64_t pairs = call.batch * n * m;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    T total = 0;
    for (int64_t chunk = 0; chunk < call.chunks; ++chunk) total += partial[chunk * pairs + pair];
    cost[pair] = total;
  }
}

// total + d term(a - b) / da times g: sign(a - b) g, 0 at a tie; or 2 (a - b) g (the 2 is in g).
template <class T, int P>
KD_INLINE Vec<T> add_slope(Vec<T> total, Vec<T> a, Vec<T> b, Vec<T> g) {
  if constexpr (P == 1) {
    total = a > b ? total + g : total;
    return a < b ? total - g : total;
  }
  return total + (a - b) * g;
}

// One task: kTileRows rows of the gradient, one panel of columns, all other rows in order.
template <class T, int P>
static void backward(const PairwiseCost& call) {
  const int64_t n = call.x.rows, m = call.y.rows;
  const int64_t row_tiles = blocks_of(n, kTileRows), panels = blocks_of(call.width, kColumns);
  const int64_t tasks = call.batch * row_tiles * panels, work = least(n, kTileRows) * m * least(call.width, kColumns);
  const T* grad = static_cast<const T*>(call.grad);
  parallel_for(tasks, blocks_of(65536, work ? work : 1), [&](int64_t begin, int64_t end) {
    constexpr int R = KD_VECTOR_BYTES == 64 ? 8 : 4;  // chains of dependent sums side by side
    T* x = static_cast<T*>(thread_scratch(0, sizeof(T) * ((2 * kTileRows + kTileOthers) * kColumns + kTileRows * kTileOthers)));
    T* y = x + kTileRows * kColumns;
    T* sums = y + kTileOthers * kColumns;
    T* g = sums + kTileRows * kColumns;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c = task % panels * kColumns, i0 = task / panels % row_tiles * kTileRows, batch = task / (panels * row_tiles);
      const int64_t rows = least(kTileRows, n - i0), all_rows = blocks_of(rows, R) * R;
      const int64_t columns = least(kColumns, call.width - c), padded = blocks_of(columns, kWidth<T>) * kWidth<T>;
      stage_panel(call.x, batch, i0, rows, c, columns, padded, x, kColumns);
      for (int64_t i = rows; i < all_rows; ++i) std::memset(x + i * kColumns, 0, sizeof(T) * std::size_t(padded));
      std::memset(sums, 0, sizeof(T) * kTileRows * kColumns);
      std::memset(g, 0, sizeof(T) * kTileRows * kTileOthers);
      for (int64_t j0 = 0; j0 < m; j0 += kTileOthers) {
        const int64_t others = least(kTileOthers, m - j0);
        stage_panel(call.y, batch, j0, others, c, columns, padded, y, kColumns);
        const T* from = grad + batch * call.grad_strides[0] + i0 * call.grad_strides[1] + j0 * call.grad_strides[2];
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < others; ++j)
            g[i * kTileOthers + j] = T(P) * from[i * call.grad_strides[1] + j * call.grad_strides[2]];
        for (int64_t i = 0; i < rows; i += R) {
          for (int64_t v = 0; v < padded; v += kWidth<T>) {
            Vec<T> a[R], total[R];
            for (int r = 0; r < R; ++r) a[r] = load(x + (i + r) * kColumns + v);
            for (int r = 0; r < R; ++r) total[r] = load(sums + (i + r) * kColumns + v);
            for (int64_t j = 0; j < others; ++j) {
              const Vec<T> b = load(y + j * kColumns + v);
              for (int r = 0; r < R; ++r) total[r] = add_slope<T, P>(total[r], a[r], b, splat(g[(i + r) * kTileOthers + j]));
            }
            for (int r = 0; r < R; ++r) store(sums + (i + r) * kColumns + v, total[r]);
          }
        }
      }
      Logits out;
      out.data = call.grad_x.data;
      out.dtype = call.grad_x.dtype;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t offset = batch * call.grad_x.batch_stride + (i0 + i) * call.grad_x.row_stride + c;
        store_logits(sums + i * kColumns, columns, out, offset, 1);
      }
    }
  });
}

}  // namespace

void pairwise_cost(const PairwiseCost& call) {
  if (call.f64) return call.p == 1 ? forward<double, 1>(call) : forward<double, 2>(call);
  return call.p == 1 ? forward<float, 1>(call) : forward<float, 2>(call);
}

void pairwise_cost_backward(const PairwiseCost& call) {
  if (call.f64) return call.p == 1 ? backward<double, 1>(call) : backward<double, 2>(call);
  return call.p == 1 ? backward<float, 1>(call) : backward<float, 2>(call);
}

}  // namespace KD_ISA
}  // namespace kdfast

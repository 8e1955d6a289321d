// CPU kernels of the divergences. Two drivers share the formulas of divergence_terms.h:
//   rows:  one row at a time, vectors along the classes, for contiguous rows (any stride works through staging);
//   lanes: one row per vector lane, for maps whose rows lie side by side (NCHW with dim = 1).
// Passes over a row: log-sum-exps; loss and the sums of v and u; gradient. A row pair of a few hundred KB stays in L2
// between them, so main memory is read once. Closed kinds (divergence_terms.h) do the last two in one.
#include "cpu/divergence.h"

#include "cpu/divergence_lanes.h"
#include "cpu/divergence_rows.h"
#include "parallel.h"

namespace kdfast {
namespace KD_ISA {
namespace {

struct Blocks {
  int64_t count, rows;  // rows per block
  int64_t per_outer;    // lanes: tiles per outer index; 0: rows driver
};

template <class T>
KD_INLINE Blocks cut(const DivergenceCall& call) {
  if (lanes_fit<T>(call)) {
    const int64_t inner = call.rows.sizes[call.rows.axes - 1], rows = tile_rows(call.classes, kWidth<T>);
    const int64_t per_outer = (inner + rows - 1) / rows;
    return {call.rows.count / inner * per_outer, rows, per_outer};
  }
  const int64_t rows = 8192 / call.classes > 1 ? 8192 / call.classes : 1;
  return {(call.rows.count + rows - 1) / rows, rows, 0};
}

}  // namespace

template <class T>
static void run(const DivergenceCall& call) {
  const Blocks blocks = cut<T>(call);
  // about 32k logits a thread at least: below that, waking one costs more than it saves
  const int64_t work = blocks.rows * call.classes, grain = work >= 32768 ? 1 : (32767 + work) / work;
  parallel_for(blocks.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      double kd = 0, ce = 0;
      if (blocks.per_outer) {
        const int64_t outer = block / blocks.per_outer, first = block % blocks.per_outer * blocks.rows;
        const int64_t left = call.rows.sizes[call.rows.axes - 1] - first;
        lanes_tile_kind<T>(call, outer, first, left < blocks.rows ? left : blocks.rows, kd, ce);
      } else {
        const int64_t stop = (block + 1) * blocks.rows < call.rows.count ? (block + 1) * blocks.rows : call.rows.count;
        for (int64_t row = block * blocks.rows; row < stop; ++row) {
          if (call.grad_rows) {
            backward_row<T>(call, row);
          } else if (call.out_rows) {
            forward_row<T>(call, row);
          } else {
            sum_row<T>(call, row, kd, ce);
          }
        }
      }
      if (call.partial_kd) {
        call.partial_kd[block] = kd;
        call.partial_ce[block] = ce;
      }
    }
    if (call.stream) stream_fence();
  });
}

int64_t divergence_blocks(const DivergenceCall& call) { return call.rows.count == 0 ? 0 : call.f64 ? cut<double>(call).count : cut<float>(call).count; }

void divergence_run(const DivergenceCall& call) {
  if (call.f64) {
    run<double>(call);
  } else {
    run<float>(call);
  }
}

}  // namespace KD_ISA
}  // namespace kdfast

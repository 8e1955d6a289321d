// CPU kernels that move rows: gather by expert, weighted sum per token, and its backward. Rows are contiguous; sums run over
// the slots of a token in slot order, in float (double for double), so the bits do not depend on the threads.
#include "cpu/routing.h"

#include "cpu/stage.h"
#include "memory.h"
#include "parallel.h"

namespace kdfast {
namespace KD_ISA {
namespace {

// About this many elements a thread at least.
KD_INLINE int64_t row_grain(int64_t width) { return 32768 / (width > 0 ? width : 1) + 1; }

template <class T, class S>
KD_INLINE void scale_row(const S* in, T factor, int64_t n, S* out) {
  constexpr int W = kWidth<T>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store_as(out + i, load_as(in + i) * factor);
  for (; i < n; ++i) store_one(out + i, T(load_one(in + i)) * factor);
}

// y = sum_j w_j rows[at_j], `found` terms; four vectors at a time stay in registers over all terms.
template <class T, class S>
KD_INLINE void sum_rows(const S* const* rows, const T* weights, int64_t found, int64_t n, S* out) {
  constexpr int W = kWidth<T>;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    Vec<T> a = splat<T>(0), b = a, c = a, d = a;
    for (int64_t j = 0; j < found; ++j) {
      const S* r = rows[j] + i;
      const Vec<T> w = splat<T>(weights[j]);
      a += w * load_as(r);
      b += w * load_as(r + W);
      c += w * load_as(r + 2 * W);
      d += w * load_as(r + 3 * W);
    }
    store_as(out + i, a);
    store_as(out + i + W, b);
    store_as(out + i + 2 * W, c);
    store_as(out + i + 3 * W, d);
  }
  for (; i < n; ++i) {
    T sum = 0;
    for (int64_t j = 0; j < found; ++j) sum += weights[j] * T(load_one(rows[j] + i));
    store_one(out + i, sum);
  }
}

// drow = w dy and <dy, row> in one walk.
template <class T, class S>
KD_INLINE T scale_and_dot(const S* dy, const S* row, T weight, int64_t n, S* drow) {
  constexpr int W = kWidth<T>;
  Vec<T> dot0 = splat<T>(0), dot1 = dot0;
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    const Vec<T> g0 = load_as(dy + i), g1 = load_as(dy + i + W);
    if (row) {
      dot0 += g0 * load_as(row + i);
      dot1 += g1 * load_as(row + i + W);
    }
    if (drow) {
      store_as(drow + i, g0 * weight);
      store_as(drow + i + W, g1 * weight);
    }
  }
  T dot = sum_lanes<T>(dot0 + dot1);
  for (; i < n; ++i) {
    const T g = T(load_one(dy + i));
    if (row) dot += g * T(load_one(row + i));
    if (drow) store_one(drow + i, g * weight);
  }
  return dot;
}

template <class T, class S>
static void gather(const MoveCall& call) {
  const S* x = static_cast<const S*>(call.x);
  S* out = static_cast<S*>(call.out);
  const T* weights = static_cast<const T*>(call.weights);
  const std::size_t bytes = std::size_t(call.width) * sizeof(S);
  parallel_for(call.end - call.begin, row_grain(call.width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t slot = call.order[call.begin + r];
      S* target = out + r * call.width;
      if (slot < 0) {
        std::memset(static_cast<void*>(target), 0, bytes);
      } else if (weights) {
        scale_row<T>(x + slot / call.k * call.width, weights[slot], call.width, target);
      } else {
        std::memcpy(static_cast<void*>(target), x + slot / call.k * call.width, bytes);
      }
    }
  });
}

template <class T, class S>
static void combine(const MoveCall& call) {
  const S* rows = static_cast<const S*>(call.x);
  S* out = static_cast<S*>(call.out);
  const T* weights = static_cast<const T*>(call.weights);
  parallel_for(call.tokens, row_grain(call.width * call.k), [&](int64_t begin, int64_t end) {
    const S** at = static_cast<const S**>(thread_scratch(0, std::size_t(call.k) * sizeof(void*)));
    T* w = static_cast<T*>(thread_scratch(1, std::size_t(call.k) * sizeof(T)));
    for (int64_t n = begin; n < end; ++n) {
      int64_t found = 0;
      for (int64_t j = 0; j < call.k; ++j) {
        const int64_t row = call.inverse[n * call.k + j];
        if (row < 0) continue;
        at[found] = rows + row * call.width;
        w[found++] = weights ? weights[n * call.k + j] : T(1);
      }
      sum_rows<T, S>(at, w, found, call.width, out + n * call.width);
    }
  });
}

template <class T, class S>
static void combine_backward(const MoveCall& call) {
  const S* rows = static_cast<const S*>(call.x);
  const S* dy = static_cast<const S*>(call.grad);
  S* drows = static_cast<S*>(call.out);
  const T* weights = static_cast<const T*>(call.weights);
  T* dw = static_cast<T*>(call.grad_weights);
  parallel_for(call.tokens, row_grain(call.width * call.k), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t j = 0; j < call.k; ++j) {
        const int64_t slot = n * call.k + j, row = call.inverse[slot];
        T dot = 0;
        if (row >= 0) {
          dot = scale_and_dot<T, S>(dy + n * call.width, dw ? rows + row * call.width : nullptr, weights ? weights[slot] : T(1),
                                    call.width, drows ? drows + row * call.width : nullptr);
        }
        if (dw) dw[slot] = dot;
      }
    }
  });
  if (!drows) return;
  parallel_for(call.total_rows, row_grain(call.width), [&](int64_t begin, int64_t end) {  // rows past the last kept slot
    for (int64_t r = begin; r < end; ++r) {
      if (call.order[r] < 0) std::memset(static_cast<void*>(drows + r * call.width), 0, std::size_t(call.width) * sizeof(S));
    }
  });
}

}  // namespace

#define KD_MOVE(function)                                          \
  switch (call.dtype) {                                            \
    case Dtype::f32: return function<float, float>(call);          \
    case Dtype::bf16: return function<float, BFloat16>(call);      \
    case Dtype::f16: return function<float, Half>(call);           \
    case Dtype::f64: return function<double, double>(call);        \
  }

void move_gather(const MoveCall& call) { KD_MOVE(gather) }
void move_combine(const MoveCall& call) { KD_MOVE(combine) }
void move_combine_backward(const MoveCall& call) { KD_MOVE(combine_backward) }

}  // namespace KD_ISA
}  // namespace kdfast

// Rows are independent; one is read once, and its softmax stays in cache between the maximum, the sum and the division.
#include "cpu/sinkhorn_kd.h"

#include "cpu/stage.h"
#include "parallel.h"

namespace kdfast {
namespace KD_ISA {
namespace {

// Whole vectors of a row in place, then the rest through a padded vector: body(vector) -> vector, `pad` where there is nothing.
template <class T, class F>
KD_INLINE void map_row(T* row, int64_t width, T pad, const F& body) {
  int64_t c = 0;
  for (; c + kWidth<T> <= width; c += kWidth<T>) store(row + c, body(load(row + c)));
  if (c < width) {
    T tail[kWidth<T>];
    for (int64_t i = 0; i < kWidth<T>; ++i) tail[i] = c + i < width ? row[c + i] : pad;
    store(tail, body(load(tail)));
    std::memcpy(row + c, tail, std::size_t(width - c) * sizeof(T));
  }
}

template <class T>
static int64_t row_grain(int64_t width) {
  return 1 + 16384 / (width + 16);
}

template <class T>
static void soften_rows(const SoftRows& call) {
  const T inverse_t = T(call.inverse_t);
  parallel_for(call.rows.count, row_grain<T>(call.width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* row = static_cast<T*>(call.probs) + i * call.width;
      T* kept = static_cast<T*>(call.kept) + i;
      *kept = 0;
      if (!call.mask || call.mask[i]) {
        load_logits(call.logits, row_offset(call.rows, call.logits, i), call.logits.class_stride, call.width, row);
        Vec<T> top = splat<T>(-T(kInf));
        IVec<T> bad = {};
        map_row(row, call.width, -T(kInf), [&](Vec<T> x) {
          top = vmax(top, x);
          bad |= !(x < T(kInf));
          return x;
        });
        const T most = max_lanes<T>(top);
        for (int lane = 0; lane < kWidth<T>; ++lane) {
          if (bad[lane]) call.status->report(i, call.bad);
        }
        if (most > -T(kInf)) {
          *kept = 1;
          Vec<T> sum = splat<T>(0);
          map_row(row, call.width, -T(kInf), [&](Vec<T> x) {
            const Vec<T> y = vexp<T>((x - most) * inverse_t);
            sum += y;
            return y;
          });
          const T inverse = T(1 / sum_lanes_double<T>(sum));
          map_row(row, call.width, T(0), [&](Vec<T> x) { return x * inverse; });
          continue;
        }
      }
      std::memset(row, 0, std::size_t(call.width) * sizeof(T));
    }
  });
}

template <class T>
static void soften_rows_backward(const SoftRows& call) {
  constexpr int64_t kPart = 1024;
  const T factor = T(call.factor * call.inverse_t);
  parallel_for(call.rows.count, row_grain<T>(call.width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* p = static_cast<const T*>(call.probs) + i * call.width;
      const T* g = static_cast<const T*>(call.grad) + i * call.width;
      const int64_t offset = row_offset(call.rows, call.grad_logits, i), stride = call.grad_logits.class_stride;
      if (!(static_cast<const T*>(call.kept)[i] > T(0))) {
        store_zeros<T>(call.width, call.grad_logits, offset, stride);
        continue;
      }
      double mean = 0;
      int64_t c = 0;
      Vec<T> sum = splat<T>(0);
      for (; c + kWidth<T> <= call.width; c += kWidth<T>) sum += load(p + c) * load(g + c);
      for (; c < call.width; ++c) mean += double(p[c]) * double(g[c]);
      mean += sum_lanes_double<T>(sum);
      T part[kPart];
      for (int64_t first = 0; first < call.width; first += kPart) {
        const int64_t count = call.width - first < kPart ? call.width - first : kPart;
        for (c = 0; c < count; ++c) part[c] = factor * p[first + c] * (g[first + c] - T(mean));
        store_logits(part, count, call.grad_logits, offset + first * stride, stride);
      }
    }
  });
}

template <class T>
static void root_all(T* w, int64_t count) {
  for (int64_t i = 0; i < count; ++i) w[i] = __builtin_sqrt(w[i]);
}
template <class T>
static void root_gradient_all(const T* w, T* g, int64_t count) {
  for (int64_t i = 0; i < count; ++i) g[i] = w[i] > T(0) ? g[i] / (2 * w[i]) : T(0);
}

}  // namespace

void soften(const SoftRows& call) { call.f64 ? soften_rows<double>(call) : soften_rows<float>(call); }
void soften_backward(const SoftRows& call) { call.f64 ? soften_rows_backward<double>(call) : soften_rows_backward<float>(call); }
void roots(void* w, int64_t count, bool f64) {
  f64 ? root_all(static_cast<double*>(w), count) : root_all(static_cast<float*>(w), count);
}
void root_gradients(const void* w, void* g, int64_t count, bool f64) {
  f64 ? root_gradient_all(static_cast<const double*>(w), static_cast<double*>(g), count)
      : root_gradient_all(static_cast<const float*>(w), static_cast<float*>(g), count);
}

}  // namespace KD_ISA
}  // namespace kdfast

// Device code of the divergences: what one block does with its part of a row. divergence.cu puts the parts together.
#pragma once

#include "cuda/cluster.h"
#include "cuda/divergence.h"
#include "cuda/packs.h"

namespace kdfast {
namespace cuda {

constexpr int kThreads = 512;
constexpr int kStats = 7;
constexpr float kFar = 32;  // as in csrc/cpu/divergence_common.h: beyond it d is taken of offsets to each model's largest logit

// The number type of divergence_terms.h here: a float of one thread.
struct DeviceOps {
  using N = float;
  static __device__ __forceinline__ N set(double value) { return float(value); }
  static __device__ __forceinline__ N select(bool mask, N a, N b) { return mask ? a : b; }
  static __device__ __forceinline__ bool equal(N a, N b) { return a == b; }
  static __device__ __forceinline__ N abs(N a) { return fabsf(a); }
  static __device__ __forceinline__ N min(N a, N b) { return fminf(a, b); }  // of a NaN and a number, the number
  static __device__ __forceinline__ N max(N a, N b) { return fmaxf(a, b); }
  static __device__ __forceinline__ N exp(N a) { return __expf(a); }
  static __device__ __forceinline__ N exp_any(N a) { return __expf(a); }
  static __device__ __forceinline__ N log1p(N a) { return log1pf(a); }
  static __device__ __forceinline__ N expm1_small(N x) { return x * (1 + x * (1.f / 2 + x * (1.f / 6 + x * (1.f / 24 + x * (1.f / 120 + x * (1.f / 720 + x * (1.f / 5040 + x * (1.f / 40320)))))))); }
  static __device__ __forceinline__ N phi_series(N x) { return 1.f / 2 + x * (1.f / 6 + x * (1.f / 24 + x * (1.f / 120 + x * (1.f / 720 + x * (1.f / 5040))))); }
  static __device__ __forceinline__ N polynomial(N x, const double* coefficients) {
    N sum = set(coefficients[7]);
    for (int i = 6; i >= 0; --i) sum = sum * x + set(coefficients[i]);
    return sum;
  }
};

// Scalars of a row, the same in every thread of its cluster.
struct RowState {
  float inverse_t = 1;
  float max_x = 0, log_x = 0, max_z = 0, log_z = 0, gap = 0;  // see kdfast/ops/divergence.py, N_STATS
  float from_x = 0, from_z = 0;                               // d = ((z - from_z) - (x - from_x)) / T - gap
  float sum_v = 0, sum_u = 0;
  float factor = 0;                                           // of the divergence's gradient: weight, 1/T, scale
  float ce_weight = 0, max_raw = 0, log_raw = 0, smooth = 0, hot = 0;  // gradient of cross-entropy: ce_weight (q1 - smooth - hot [i = label])
  bool ce_is_q = false;                                       // at T = 1 its softmax is q
  int64_t label = -1;

  __device__ __forceinline__ void set_far() {
    const bool far = fabsf(max_z - max_x) > kFar;
    from_x = far ? max_x : 0;
    from_z = far ? max_z : 0;
  }
};

// A block's classes of one row: [first, first + count), and whether they and their gradients are read and written in whole packs.
struct Part {
  int64_t first;
  int count;
  bool wide;
};

// log(b / a) of positive sums: 0 for equal ones, the negative for swapped ones.
__device__ __forceinline__ float log_ratio(float a, float b) {
  const float size = logf(fmaxf(a, b) / fminf(a, b));
  return b > a ? size : -size;
}

// Copies a part of a row to shared memory, in batches so that several loads are under way, and finds its largest logit.
template <class T>
__device__ __forceinline__ float stage(const T* from, T* to, Part part) {
  constexpr int batch = 4, step = kThreads * kPack;
  float top = Max::start;
  for (int start = threadIdx.x * kPack; start < part.count; start += step * batch) {
    Pack<T> packs[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      const int at = start + b * step;
      if (at < part.count) packs[b] = load_logits(from + at, part.count - at, part.wide);
    }
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      if (start + b * step >= part.count) break;
      store_pack(to + start + b * step, packs[b]);
#pragma unroll
      for (int k = 0; k < kPack; ++k) top = fmaxf(top, to_float(packs[b].v[k]));  // a NaN shows in the sum
    }
  }
  return top;
}

// Sums above the largest logits: of exp((x - max_x) / T), exp((z - max_z) / T); for cross-entropy exp(x - max_x) and x - max_x.
// A thread reads the packs that it staged.
template <class T>
__device__ __forceinline__ void add_exponentials(const T* xs, const T* zs, Part part, const RowState& row, bool raw, bool smooth, float (&sums)[4]) {
  for (int start = threadIdx.x * kPack; start < part.count; start += kThreads * kPack) {
    const auto x = load_pack(xs + start), z = load_pack(zs + start);
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      const float above = to_float(x.v[k]) - row.max_x;
      sums[0] += __expf(above * row.inverse_t);
      sums[1] += __expf((to_float(z.v[k]) - row.max_z) * row.inverse_t);
      if (raw) sums[2] += __expf(above);
      if (smooth && start + k < part.count) sums[3] += above;
    }
  }
}

// One walk over a part that lies at xs, zs: in shared memory (STAGED) or where the caller has it. SUMS: adds (loss, sum v, sum u)
// to `found`; GRADIENTS: writes them to the row's place in their tensors (gs, gt: elements to its first class).
template <Kind kind, bool STAGED, bool SUMS, bool GRADIENTS, class T>
__device__ __forceinline__ void walk(const Divergence& call, const RowState& row, Part part, const T* xs, const T* zs, int64_t gs, int64_t gt,
                                     float (&found)[3]) {
  for (int start = threadIdx.x * kPack; start < part.count; start += kThreads * kPack) {
    const int left = part.count - start;
    const auto x = load_logits(xs + start, left, STAGED || part.wide), z = load_logits(zs + start, left, STAGED || part.wide);
    float grad_s[kPack], grad_t[kPack];
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      const float xi = to_float(x.v[k]), zi = to_float(z.v[k]);
      const float lq = (xi - row.max_x) * row.inverse_t - row.log_x, lp = (zi - row.max_z) * row.inverse_t - row.log_z;
      const float d = ((zi - row.from_z) - (xi - row.from_x)) * row.inverse_t - row.gap;
      const Element<float> e = divergence_element<DeviceOps, kind>(lq, lp, d, call.parameters);
      if (SUMS) found[0] += e.term, found[1] += e.v, found[2] += e.u;
      if (GRADIENTS) {
        // factor 0 leaves the divergence out: 0 times the gradient of an infinite one is not 0
        grad_s[k] = row.factor == 0 ? 0 : (e.v - e.q * row.sum_v) * row.factor;
        grad_t[k] = row.factor == 0 ? 0 : (e.u - e.p * row.sum_u) * row.factor;
        if (row.ce_weight != 0) {
          const float q1 = row.ce_is_q ? e.q : __expf((xi - row.max_raw) - row.log_raw);
          const float target = part.first + start + k == row.label ? row.smooth + row.hot : row.smooth;
          grad_s[k] += (q1 - target) * row.ce_weight;
        }
      }
    }
    if (GRADIENTS) {
      if (call.grad_student.data) store_values<T>(call.grad_student, gs + part.first + start, grad_s, left, part.wide);
      if (call.grad_teacher.data) store_values<T>(call.grad_teacher, gt + part.first + start, grad_t, left, part.wide);
    }
  }
}

// `value` to the columns [begin, end) of a gradient's row; `me` of `all` threads.
__device__ __forceinline__ void fill(const Logits& grad, int64_t row, int64_t begin, int64_t end, float value, int64_t me, int64_t all) {
  if (!grad.data) return;
  for (int64_t at = row + begin + me; at < row + end; at += all) {
    if (grad.dtype == Dtype::bf16) {
      static_cast<__nv_bfloat16*>(grad.data)[at] = from_float<__nv_bfloat16>(value);
    } else if (grad.dtype == Dtype::f16) {
      static_cast<__half*>(grad.data)[at] = from_float<__half>(value);
    } else {
      static_cast<float*>(grad.data)[at] = value;
    }
  }
}

// Both gradients of a whole row.
__device__ __forceinline__ void fill_row(const Divergence& call, int64_t gs, int64_t gt, float value, int64_t me, int64_t all) {
  fill(call.grad_student, gs, 0, call.classes, value, me, all);
  fill(call.grad_teacher, gt, 0, call.classes, value, me, all);
}
// Zeros for the classes beyond those compared.
__device__ __forceinline__ void fill_rest(const Divergence& call, int64_t gs, int64_t gt, int64_t me, int64_t all) {
  fill(call.grad_student, gs, call.classes, call.student_width, 0, me, all);
  fill(call.grad_teacher, gt, call.classes, call.teacher_width, 0, me, all);
}

}  // namespace cuda
}  // namespace kdfast

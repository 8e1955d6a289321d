// Lanes driver of the divergences: one row per vector lane.
#pragma once

#include "cpu/divergence_common.h"
#include "cpu/divergence_tile.h"

namespace kdfast {
namespace KD_ISA {
namespace {

// Rows that lie side by side (class axis strided, innermost row axis contiguous): each vector lane is one row, and a tile of
// rows x classes is staged so that main memory is read in runs of a kilobyte instead of one element per row. Rows of few
// classes come here too, however they lie: a vector along ten classes is half empty, and the sums of a hundred cost as much as the terms.
constexpr int64_t kTileLogits = 4096;  // per model: 16 KB (float)
constexpr int64_t kLanesMaxClasses = 4096;
template <class T>
constexpr int64_t kShortRow = 16 * kWidth<T>;  // from about here on vectors along the classes are as fast (measured at 16, 8 and 4 lanes)

KD_INLINE int64_t tile_rows(int64_t classes, int width) {
  const int64_t rows = kTileLogits / classes / width * width;
  return rows < width ? width : rows > 256 ? 256 : rows;
}

template <class T>
KD_INLINE bool lanes_fit(const DivergenceCall& call) {
  const int inner = call.rows.axes - 1;
  if (call.kind == Kind::dkd || call.zero || call.rows.sizes[inner] < kWidth<T>) return false;
  if (call.classes <= kShortRow<T>) return true;
  const auto side_by_side = [&](const Logits& logits) { return !logits.data || logits.row_strides[inner] == 1; };
  return call.student.class_stride != 1 && call.classes <= kLanesMaxClasses && side_by_side(call.student) &&
         side_by_side(call.teacher) && side_by_side(call.grad_student) && side_by_side(call.grad_teacher);
}

// Per-row values of a group of lanes; lanes past the end of the tile read `otherwise`.
template <class T>
KD_INLINE Vec<T> lane_values(const void* values, int64_t row, int live, T otherwise) {
  if (!values) return splat<T>(otherwise);
  const T* from = static_cast<const T*>(values) + row;
  if (live == kWidth<T>) return load(from);
  Vec<T> v = splat<T>(otherwise);
  for (int i = 0; i < live; ++i) v[i] = from[i];
  return v;
}
template <class T>
KD_INLINE void store_lanes(void* values, int64_t row, int live, Vec<T> v) {
  T* to = static_cast<T*>(values) + row;
  for (int i = 0; i < live; ++i) to[i] = v[i];
}

// Log-sum-exp per lane of x / T over the classes of a staged tile.
template <class T>
struct LaneSum {
  Vec<T> max, log, inverse;  // largest logit; log and inverse of the sum of exp((x - max) / T); where all are -inf: log = inverse = 0
};

// keep: [classes][W] for the exponentials, or null.
template <class T>
KD_INLINE LaneSum<T> lane_sum(const T* x, int64_t classes, int64_t pitch, Vec<T> inverse_t, T* keep, Ahead ahead) {
  LaneSum<T> found;
  found.max = splat<T>(-T(kInf));
  for (int64_t c = 0; c < classes; ++c) found.max = vmax(found.max, load(x + c * pitch));
  const Vec<T> zero = splat<T>(0), shift = found.max == -T(kInf) ? zero : found.max;
  Vec<T> sum = zero;
  for (int64_t c = 0; c < classes; ++c) {
    fetch(ahead, c);
    const Vec<T> e = vexp_bounded<T>((load(x + c * pitch) - shift) * inverse_t);
    if (keep) store(keep + c * kWidth<T>, e);
    sum += e;
  }
  // sum is 0 only where all logits are -inf (that row is ignored) and NaN where something is wrong
  found.log = sum > zero ? vlog<T>(sum) : sum;
  found.inverse = sum > zero ? T(1) / sum : zero;
  return found;
}

template <Kind kind, class T>
static void lanes_tile(const DivergenceCall& call, int64_t outer, int64_t first, int64_t count, double& kd, double& ce) {
  using O = VectorOps<T>;
  constexpr int W = kWidth<T>;
  const int64_t C = call.classes, pitch = (count + W - 1) / W * W, inner_size = call.rows.sizes[call.rows.axes - 1];
  const int64_t row0 = outer * inner_size + first;
  T* x = static_cast<T*>(thread_scratch(0, std::size_t(C * pitch) * sizeof(T)));
  T* z = static_cast<T*>(thread_scratch(1, std::size_t(C * pitch) * sizeof(T)));
  const bool gs = call.grad_student.data, gt = call.grad_teacher.data;
  T* grad_s = gs ? static_cast<T*>(thread_scratch(2, std::size_t(C * pitch) * sizeof(T))) : nullptr;
  T* grad_t = gt ? static_cast<T*>(thread_scratch(3, std::size_t(C * pitch) * sizeof(T))) : nullptr;
  // of one group of lanes, [C][W]: exponentials, then q and p; at last q and v
  T* qs = static_cast<T*>(thread_scratch(4, std::size_t(C * W) * sizeof(T)));
  T* ps = static_cast<T*>(thread_scratch(5, std::size_t(C * W) * sizeof(T)));
  const int64_t s = row_offset(call.rows, call.student, row0), t = row_offset(call.rows, call.teacher, row0);
  const auto beside = [&](const Logits& logits) { return logits.row_strides[call.rows.axes - 1]; };
  gather_tile(call.student, s, beside(call.student), count, C, x, pitch);
  gather_tile(call.teacher, t, beside(call.teacher), count, C, z, pitch);
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t i = count; i < pitch; ++i) x[c * pitch + i] = z[c * pitch + i] = 0;
  }
  const bool backward = call.grad_rows, rows_entry = call.out_rows;
  const bool cross_entropy = call.ce_factor != 0 && !backward && !rows_entry;
  constexpr bool by_softmax = kind != Kind::binary;
  const bool closed = is_closed(kind) && !gt, softmax_is_q = by_softmax && call.temperature == 1 && !call.row_temperature;
  const auto ahead = [&](const Logits& logits, int64_t offset, int64_t group) {  // the same lanes of the next tile
    return beneath(logits, beside(logits), offset + count + group);
  };
  const Vec<T> zero = splat<T>(0), negative_inf = splat<T>(-T(kInf));
  const KindParameters parameters = call.parameters;
  T* kept = static_cast<T*>(call.stats);
  for (int64_t group = 0; group < pitch; group += W) {
    const int64_t row = row0 + group;
    const int live = int(count - group < W ? count - group : W);
    const T *xs = x + group, *zs = z + group;
    // upstream gradient or weight; a lane where it is 0 (past the end of the tile too) holds anything and gives 0
    const void* factors = backward ? call.grad_rows : rows_entry ? nullptr : call.row_weight;
    Vec<T> wanted = splat<T>(1);
    if (factors) {
      wanted = lane_values<T>(factors, row, live, T(0));
    } else {
      for (int i = live; i < W; ++i) wanted[i] = 0;
    }
    const Vec<T> inverse_t = splat<T>(1) / lane_values<T>(call.row_temperature, row, live, T(call.temperature));
    Vec<T> max_x, log_x, max_z, log_z, gap, sum_v = zero, sum_u = zero, ignored, to_q = splat<T>(1), to_p = to_q;
    if (backward) {
      const auto stat = [&](int i) { return lane_values<T>(kept + i * call.rows.count, row, live, T(0)); };
      max_x = stat(0), log_x = stat(1), max_z = stat(2), log_z = stat(3), gap = stat(4), sum_v = stat(5), sum_u = stat(6);
      ignored = gap != gap ? splat<T>(1) : zero;
      for (int64_t c = 0; by_softmax && c < C; ++c) {
        store(qs + c * W, vexp_bounded<T>((load(xs + c * pitch) - max_x) * inverse_t - log_x));
        store(ps + c * W, vexp_bounded<T>((load(zs + c * pitch) - max_z) * inverse_t - log_z));
      }
    } else {
      const LaneSum<T> of_x = lane_sum<T>(xs, C, pitch, inverse_t, by_softmax ? qs : nullptr, ahead(call.student, s, group));
      const LaneSum<T> of_z = lane_sum<T>(zs, C, pitch, inverse_t, by_softmax ? ps : nullptr, ahead(call.teacher, t, group));
      max_x = of_x.max, log_x = of_x.log, to_q = of_x.inverse, max_z = of_z.max, log_z = of_z.log, to_p = of_z.inverse;
      for (int i = 0; i < live; ++i) {
        if (wanted[i] == 0) continue;
        if (log_x[i] != log_x[i] || max_x[i] == T(kInf)) call.status->report(row + i, Bad::student);
        if (log_z[i] != log_z[i] || max_z[i] == T(kInf)) call.status->report(row + i, Bad::teacher);
      }
      ignored = max_x == negative_inf ? splat<T>(1) : (max_z == negative_inf ? splat<T>(1) : zero);
      gap = log_z - log_x;
      if (!by_softmax) max_x = log_x = max_z = log_z = gap = zero;
    }
    Vec<T> from_x = zero, from_z = zero;
    for (int i = 0; i < W; ++i) {
      if (far_apart<T>(max_x[i], max_z[i])) from_x[i] = max_x[i], from_z[i] = max_z[i];
    }
    if (!backward) gap += ((max_z - from_z) - (max_x - from_x)) * inverse_t;
    const Vec<T> skip = wanted == 0 ? splat<T>(1) : ignored;
    const auto element = [&](int64_t c) {
      const Vec<T> xi = load(xs + c * pitch), zi = load(zs + c * pitch);
      const Vec<T> lq = (xi - max_x) * inverse_t - log_x, lp = (zi - max_z) * inverse_t - log_z;
      Element<Vec<T>> e{};
      if constexpr (by_softmax) e.q = load(qs + c * W) * to_q, e.p = load(ps + c * W) * to_p;
      return divergence_element<O, kind, by_softmax>(lq, lp, ((zi - from_z) - (xi - from_x)) * inverse_t - gap, parameters, e);
    };
    Vec<T> max_raw = zero, log_raw = zero, label = splat<T>(-1), ce_weight = zero;
    if (cross_entropy) {
      Vec<T> total = zero, hot = zero;  // logits above the largest
      const LaneSum<T> raw = softmax_is_q ? LaneSum<T>{max_x, log_x, to_q} : lane_sum<T>(xs, C, pitch, splat<T>(1), nullptr, {});
      max_raw = raw.max, log_raw = raw.log;
      for (int i = 0; i < live; ++i) {
        if (skip[i] != 0) continue;
        const int64_t y = call.labels[row + i];
        if (y < 0 || y >= C) {
          call.status->report(row + i, Bad::label);
          continue;
        }
        label[i] = T(y);  // exact: y < kLanesMaxClasses
        hot[i] = xs[y * pitch + i] - max_raw[i];
      }
      Vec<T> loss = log_raw - hot;
      if (call.label_smoothing != 0) {
        for (int64_t c = 0; c < C; ++c) total += load(xs + c * pitch) - max_raw;
        loss = loss * T(1 - call.label_smoothing) + (log_raw - total / T(C)) * T(call.label_smoothing);
      }
      ce += sum_lanes_double<T>(skip != 0 ? zero : loss * wanted);
      ce_weight = wanted * T(call.ce_factor);
    }
    const Vec<T> factor = wanted * (T((backward ? 1.0 : call.kd_factor) * parameters.scale) * inverse_t);
    const T smooth = T(call.label_smoothing / double(C)), hot_share = T(1 - call.label_smoothing);
    const auto write_student = [&](int64_t c, Vec<T> q, Vec<T> v) {
      Vec<T> g = scaled_lanes<T>(v - q * sum_v, factor);
      if (cross_entropy) {
        const Vec<T> target = label == T(c) ? splat<T>(smooth + hot_share) : splat<T>(smooth);
        const Vec<T> softmax = softmax_is_q ? q : vexp_bounded<T>((load(xs + c * pitch) - max_raw) - log_raw);
        g += (softmax - target) * ce_weight;
      }
      store(grad_s + c * pitch + group, skip != 0 ? zero : g);
    };
    const bool keep_v = !backward && !closed && gs && !gt;
    if (!backward) {
      Vec<T> loss = zero, all_v = zero;
      for (int64_t c = 0; c < C; ++c) {
        const Element<Vec<T>> e = element(c);
        loss += e.term;
        all_v += e.v;
        sum_u += e.u;
        if (closed && gs) write_student(c, e.q, e.v);  // sum_v is 0
        if (keep_v) {
          store(qs + c * W, e.q);
          store(ps + c * W, e.v);
        }
      }
      if (!is_closed(kind)) sum_v = all_v;
      if (!by_softmax) sum_u = zero;
      loss = skip != 0 ? zero : loss * T(parameters.scale);
      if (rows_entry) {
        const Vec<T> none = splat<T>(T(__builtin_nan("")));  // an ignored row has no gradient
        store_lanes<T>(call.out_rows, row, live, loss);
        const Vec<T> stats[kStats] = {max_x, log_x, max_z, log_z, skip != 0 ? none : gap, sum_v, sum_u};
        for (int i = 0; i < kStats; ++i) store_lanes<T>(kept + i * call.rows.count, row, live, stats[i]);
        continue;
      }
      kd += sum_lanes_double<T>(skip != 0 ? zero : loss * wanted);
    }
    if (closed && !backward) continue;
    for (int64_t c = 0; (gs || gt) && c < C; ++c) {
      if (keep_v) {
        write_student(c, load(qs + c * W), load(ps + c * W));
        continue;
      }
      const Element<Vec<T>> e = element(c);
      if (gs) write_student(c, e.q, e.v);
      if (gt) store(grad_t + c * pitch + group, skip != 0 ? zero : scaled_lanes<T>(e.u - e.p * sum_u, factor));
    }
  }
  const auto write = [&](const Logits& grad, const T* values, int64_t width) {
    const int64_t to = row_offset(call.rows, grad, row0);
    scatter_tile(values, pitch, count, C, grad, to, beside(grad));
    for (int64_t c = C; c < width; ++c) store_zeros<T>(count, grad, to + c * grad.class_stride, beside(grad));
  };
  if (gs) write(call.grad_student, grad_s, call.student_width);
  if (gt) write(call.grad_teacher, grad_t, call.teacher_width);
}

template <class T>
static void lanes_tile_kind(const DivergenceCall& call, int64_t outer, int64_t first, int64_t count, double& kd, double& ce) {
  switch (call.kind) {
    case Kind::dkd:
    case Kind::forward_kl: return lanes_tile<Kind::forward_kl, T>(call, outer, first, count, kd, ce);
    case Kind::reverse_kl: return lanes_tile<Kind::reverse_kl, T>(call, outer, first, count, kd, ce);
    case Kind::jeffreys: return lanes_tile<Kind::jeffreys, T>(call, outer, first, count, kd, ce);
    case Kind::js: return lanes_tile<Kind::js, T>(call, outer, first, count, kd, ce);
    case Kind::skew_forward_kl: return lanes_tile<Kind::skew_forward_kl, T>(call, outer, first, count, kd, ce);
    case Kind::skew_reverse_kl: return lanes_tile<Kind::skew_reverse_kl, T>(call, outer, first, count, kd, ce);
    case Kind::tvd: return lanes_tile<Kind::tvd, T>(call, outer, first, count, kd, ce);
    case Kind::alpha: return lanes_tile<Kind::alpha, T>(call, outer, first, count, kd, ce);
    case Kind::binary: return lanes_tile<Kind::binary, T>(call, outer, first, count, kd, ce);
  }
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kdfast

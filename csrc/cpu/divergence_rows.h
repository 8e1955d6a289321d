// Rows driver of the divergences: one row at a time, vectors along the classes. Passes after the log-sum-exps, and what ties
// them into the three entries.
#pragma once

#include "cpu/divergence_log_sums.h"

namespace kdfast {
namespace KD_ISA {
namespace {

// What one sweep over a row does. Factors already hold weight, upstream gradient and 1/T.
template <class T>
struct Sweep {
  bool loss = false, sums = false;
  bool grad_student = false, grad_teacher = false;
  T student_factor = 0, teacher_factor = 0;
  T v_factor = 1;                                          // dkd: the non-target weight
  T ce_factor = 0, ce_max = 0, ce_log = 0, ce_smooth = 0, ce_hot = 0;  // gradient of cross-entropy: ce (q1 - smooth - hot [i = label])
  bool ce_is_q = false;                                    // at T = 1 cross-entropy's softmax is q itself
  int64_t hole = -1;                                       // dkd's target class; its gradient is `hole_grad`
  T hole_grad = 0;
  bool keep_v = false;                                     // leave q and v in Kept for finish_row
};

template <class T>
KD_INLINE Vec<T> cross_entropy_gradient(const Sweep<T>& todo, Vec<T> x, Vec<T> q) {
  return ((todo.ce_is_q ? q : vexp_bounded<T>((x - todo.ce_max) - todo.ce_log)) - todo.ce_smooth) * todo.ce_factor;
}

// The single classes of a block's gradient: dkd's target, cross-entropy's label.
template <class T>
KD_INLINE void fix_single_classes(const Row<T>& row, const Sweep<T>& todo, T* grad, int64_t start, int n) {
  if (todo.hole >= start && todo.hole < start + n) grad[todo.hole - start] += todo.hole_grad;
  if (todo.ce_factor != 0 && row.label >= start && row.label < start + n) grad[row.label - start] -= todo.ce_factor * todo.ce_hot;
}

// exp of a kept block's max over the row's log-sum-exp: the factor from kept exponentials to probabilities.
template <class T>
KD_INLINE T kept_scale(T max, T inverse_t, double lse) {
  return max == -T(kInf) ? T(0) : T(__builtin_exp(double(max) * double(inverse_t) - lse));
}

template <Kind kind, class T, bool known>
static double sweep(const Row<T>& row, const Sweep<T>& todo, Stats<T>& stats, Kept<T>& kept) {
  using O = VectorOps<T>;
  constexpr int W = kWidth<T>;
  const DivergenceCall& call = *row.call;
  alignas(64) T buffer_x[kBlock], buffer_z[kBlock], buffer_gs[kBlock], buffer_gt[kBlock];
  double loss = 0, sum_v = 0, sum_u = 0;
  const T inverse_t = row.inverse_t;
  const Vec<T> max_x = splat<T>(stats.max_x), log_x = splat<T>(stats.log_x), max_z = splat<T>(stats.max_z), log_z = splat<T>(stats.log_z);
  const bool far = far_apart(stats.max_x, stats.max_z);
  const Vec<T> from_x = splat<T>(far ? stats.max_x : T(0)), from_z = splat<T>(far ? stats.max_z : T(0)), gap = splat<T>(stats.gap);
  const Vec<T> v_sum = splat<T>(stats.sum_v), u_sum = splat<T>(stats.sum_u), v_factor = splat<T>(todo.v_factor);
  const KindParameters parameters = call.parameters;
  const int64_t last = (call.classes - 1) / kBlock * kBlock;
  for (int64_t start = last; start >= 0; start -= kBlock) {  // backwards: the end of the row is the warmest part
    const int n = int(call.classes - start < kBlock ? call.classes - start : kBlock);
    const T* x = block_of(call.student, row.s, start, n, todo.hole, buffer_x);
    const T* z = block_of(call.teacher, row.t, start, n, todo.hole, buffer_z);
    T* out_gs = todo.grad_student ? out_block(call.grad_student, row.gs, start, n, buffer_gs) : nullptr;
    T* out_gt = todo.grad_teacher ? out_block(call.grad_teacher, row.gt, start, n, buffer_gt) : nullptr;
    const bool stream_gs = may_stream<T>(call, out_gs, buffer_gs);
    Vec<T> loss_lanes = splat<T>(0), v_lanes = loss_lanes, u_lanes = loss_lanes;
    const Vec<T> to_q = splat<T>(known ? kept_scale(kept.max_first[start / kBlock], inverse_t, kept.lse) : 0);
    const Vec<T> to_p = splat<T>(known ? kept_scale(kept.max_second[start / kBlock], inverse_t, kept.lse_z) : 0);
    for (int i = 0; i < n; i += W) {
      const Vec<T> xi = load(x + i), zi = load(z + i);
      const Vec<T> lq = (xi - max_x) * inverse_t - log_x, lp = (zi - max_z) * inverse_t - log_z;
      const Vec<T> d = ((zi - from_z) - (xi - from_x)) * inverse_t - gap;
      Element<Vec<T>> e{};
      if constexpr (known) e.q = load(kept.first + start + i) * to_q, e.p = load(kept.second + start + i) * to_p;
      e = divergence_element<O, kind, known>(lq, lp, d, parameters, e);
      if (todo.loss) loss_lanes += e.term;
      if (todo.sums) {
        v_lanes += e.v;
        u_lanes += e.u;
      }
      if (known && todo.keep_v) {
        store(kept.first + start + i, e.q);
        store(kept.second + start + i, e.v);
      }
      if (todo.grad_student) {
        Vec<T> g = scaled<T>(e.v * v_factor - e.q * v_sum, todo.student_factor);
        if (todo.ce_factor != 0) g += cross_entropy_gradient(todo, xi, e.q);
        if (stream_gs) {
          stream<T>(out_gs + i, g);
        } else {
          store(out_gs + i, g);
        }
      }
      if (todo.grad_teacher) store(out_gt + i, scaled<T>(e.u - e.p * u_sum, todo.teacher_factor));
    }
    if (todo.loss) loss += sum_lanes_double<T>(loss_lanes);
    if (todo.sums) {
      sum_v += sum_lanes_double<T>(v_lanes);
      sum_u += sum_lanes_double<T>(u_lanes);
    }
    if (todo.grad_student) {
      fix_single_classes(row, todo, out_gs, start, n);
      flush(out_gs, buffer_gs, n, call.grad_student, row.gs, start);
    }
    if (todo.grad_teacher) flush(out_gt, buffer_gt, n, call.grad_teacher, row.gt, start);
  }
  if (todo.sums) {
    stats.sum_v = T(sum_v);
    stats.sum_u = T(sum_u);
  }
  return loss;
}

// The student's gradient from the q and v that a sweep left.
template <class T>
static void finish_row(const Row<T>& row, const Sweep<T>& todo, const Stats<T>& stats, const Kept<T>& kept) {
  const DivergenceCall& call = *row.call;
  alignas(64) T buffer_x[kBlock], buffer_gs[kBlock];
  const Vec<T> v_sum = splat<T>(stats.sum_v), v_factor = splat<T>(todo.v_factor);
  for (int64_t start = 0; start < call.classes; start += kBlock) {
    const int n = int(call.classes - start < kBlock ? call.classes - start : kBlock);
    const bool need_x = todo.ce_factor != 0 && !todo.ce_is_q;
    const T* x = need_x ? block_of(call.student, row.s, start, n, todo.hole, buffer_x) : kept.first + start;
    T* out = out_block(call.grad_student, row.gs, start, n, buffer_gs);
    const bool streamed = may_stream<T>(call, out, buffer_gs);
    for (int i = 0; i < n; i += kWidth<T>) {
      const Vec<T> q = load(kept.first + start + i), v = load(kept.second + start + i);
      Vec<T> g = scaled<T>(v * v_factor - q * v_sum, todo.student_factor);
      if (todo.ce_factor != 0) g += cross_entropy_gradient(todo, load(x + i), q);
      if (streamed) {
        stream<T>(out + i, g);
      } else {
        store(out + i, g);
      }
    }
    fix_single_classes(row, todo, out, start, n);
    flush(out, buffer_gs, n, call.grad_student, row.gs, start);
  }
}

template <Kind kind, class T>
KD_INLINE double sweep_either(const Row<T>& row, const Sweep<T>& todo, Stats<T>& stats, Kept<T>& kept) {
  return kept.first ? sweep<kind, T, true>(row, todo, stats, kept) : sweep<kind, T, false>(row, todo, stats, kept);
}

template <class T>
static double sweep_kind(const Row<T>& row, const Sweep<T>& todo, Stats<T>& stats, Kept<T>& kept) {
  switch (row.call->kind) {
    case Kind::forward_kl:
    case Kind::dkd: return sweep_either<Kind::forward_kl, T>(row, todo, stats, kept);
    case Kind::reverse_kl: return sweep_either<Kind::reverse_kl, T>(row, todo, stats, kept);
    case Kind::jeffreys: return sweep_either<Kind::jeffreys, T>(row, todo, stats, kept);
    case Kind::js: return sweep_either<Kind::js, T>(row, todo, stats, kept);
    case Kind::skew_forward_kl: return sweep_either<Kind::skew_forward_kl, T>(row, todo, stats, kept);
    case Kind::skew_reverse_kl: return sweep_either<Kind::skew_reverse_kl, T>(row, todo, stats, kept);
    case Kind::tvd: return sweep_either<Kind::tvd, T>(row, todo, stats, kept);
    case Kind::alpha: return sweep_either<Kind::alpha, T>(row, todo, stats, kept);
    case Kind::binary: return sweep<Kind::binary, T, false>(row, todo, stats, kept);
  }
  return 0;
}

template <class T>
KD_INLINE double class_value(const Logits& logits, int64_t offset, int64_t label) {
  T value = 0;
  load_logits(logits, offset + label * logits.class_stride, 1, 1, &value);
  return double(value);
}

// What log_sums found, as the sweeps need it.
template <class T>
struct Prepared {
  bool ignored = false;  // all -inf in one model: loss and gradient 0
  Stats<T> stats;
  double extra_loss = 0;               // dkd: the target term
  double v_factor = 1, hole_grad = 0;  // dkd
  double ce = 0, ce_lse = 0, ce_max = 0;  // loss of cross-entropy; its log-sum-exp and largest logit
  bool ce_is_q = false;
  Kept<T> kept;
};

// The number type of divergence_terms.h for single values.
struct ScalarOps {
  using N = double;
  KD_INLINE N set(double value) { return value; }
  KD_INLINE N select(bool mask, N a, N b) { return mask ? a : b; }
  KD_INLINE N abs(N a) { return __builtin_fabs(a); }
  KD_INLINE N phi_series(N x) { return VectorOps<double>::phi_series(splat(x))[0]; }
};

// KL of two coins whose logs are known on both sides.
KD_INLINE double coin_kl(double log_p1, double log_p0, double log_q1, double log_q0) {
  const double p1 = __builtin_exp(log_p1), p0 = __builtin_exp(log_p0);
  const double q1 = __builtin_exp(log_q1), q0 = __builtin_exp(log_q0);
  return kl<ScalarOps>(p1, q1, log_p1 - log_q1).term + kl<ScalarOps>(p0, q0, log_p0 - log_q0).term;
}

// log(1 / (1 + e^-x)); e^-x itself overflows from x = -710 on.
KD_INLINE double log_sigmoid(double x) { return (x < 0 ? x : 0) - __builtin_log1p(__builtin_exp(x < 0 ? x : -x)); }

// A model without any class beside dkd's target keeps zeros.
template <class T>
KD_INLINE void set_log_sums(const LogSums<T>& sums, T inverse_t, Stats<T>& stats) {
  const LogSum<T>&s = sums.student, &t = sums.teacher;
  const double max_x = s.empty() ? 0 : double(s.max), max_z = t.empty() ? 0 : double(t.max);
  const double log_x = s.empty() ? 0 : s.log, log_z = t.empty() ? 0 : t.log;
  stats.max_x = T(max_x), stats.log_x = T(log_x);
  stats.max_z = T(max_z), stats.log_z = T(log_z);
  stats.gap = T((far_apart(stats.max_x, stats.max_z) ? 0 : (max_z - max_x) * double(inverse_t)) + (log_z - log_x));
}

template <class T>
static void prepare_dkd(const Row<T>& row, const LogSums<T>& sums, Prepared<T>& out) {
  const DivergenceCall& call = *row.call;
  const double x = class_value<T>(call.student, row.s, row.label) * double(row.inverse_t);
  const double z = class_value<T>(call.teacher, row.t, row.label) * double(row.inverse_t);
  const bool rest_x = !sums.student.empty(), rest_z = !sums.teacher.empty();
  const double inf = __builtin_inf();
  const double lx = rest_x ? sums.student.value(row.inverse_t) : -inf, lz = rest_z ? sums.teacher.value(row.inverse_t) : -inf;
  // a row with nothing but -inf, the target included, is ignored
  out.ignored = (!rest_x && x == -inf) || (!rest_z && z == -inf);
  if (out.ignored) return;
  // log-probabilities of target (1) and rest (0), from the log-odds
  const double ox = x - lx, oz = z - lz;
  const double q1 = log_sigmoid(ox), q0 = log_sigmoid(-ox), p1 = log_sigmoid(oz), p0 = log_sigmoid(-oz);
  const double A = call.dkd[0], B = rest_z ? call.dkd[1] : 0;  // no rest in the teacher: nothing to compare
  const double g = q1 > -0.6931 ? __builtin_exp(p0) - __builtin_exp(q0) : __builtin_exp(q1) - __builtin_exp(p1);  // q1 - p1
  out.extra_loss = A * coin_kl(p1, p0, q1, q0);
  out.v_factor = B;
  out.hole_grad = A * g;
  set_log_sums(sums, row.inverse_t, out.stats);
  out.stats.sum_v = T(A * g);  // dL/dx_i = B (q^_i - p^_i) - A g q^_i
  out.stats.sum_u = T(B);      // kept for the backward
}

// Log-sum-exps of a row and what follows from them. False: something is wrong with the values, reported.
template <class T>
static bool prepare(const Row<T>& row, bool cross_entropy, Prepared<T>& out) {
  const DivergenceCall& call = *row.call;
  const bool dkd = call.kind == Kind::dkd;
  LogSums<T> sums;
  if (call.kind != Kind::binary) Kept<T>::reserve(out.kept, call);
  log_sums(row, dkd ? row.label : -1, cross_entropy, cross_entropy && call.label_smoothing != 0, sums, out.kept);
  if (sums.student.bad()) return call.status->report(row.index, Bad::student), false;
  if (sums.teacher.bad()) return call.status->report(row.index, Bad::teacher), false;
  out.kept.lse = sums.student.value(row.inverse_t);
  out.kept.lse_z = sums.teacher.value(row.inverse_t);
  if (dkd) {
    const double x = class_value<T>(call.student, row.s, row.label), z = class_value<T>(call.teacher, row.t, row.label);
    if (!(x < double(kInf))) return call.status->report(row.index, Bad::student), false;
    if (!(z < double(kInf))) return call.status->report(row.index, Bad::teacher), false;
    prepare_dkd(row, sums, out);
  } else {
    out.ignored = sums.student.empty() || sums.teacher.empty();
    if (!out.ignored && call.kind != Kind::binary) {
      set_log_sums(sums, row.inverse_t, out.stats);
    }
  }
  if (cross_entropy && !out.ignored) {
    const double x = class_value<T>(call.student, row.s, row.label);
    out.ce_lse = sums.has_raw ? sums.raw.value(T(1)) : sums.student.value(T(1));
    out.ce_max = sums.student.empty() ? 0 : double(sums.student.max);
    out.ce_is_q = !sums.has_raw && !dkd && call.kind != Kind::binary;
    if (dkd) {  // the target was left out of the sum
      const double high = out.ce_lse > x ? out.ce_lse : x, low = out.ce_lse > x ? x : out.ce_lse;
      out.ce_lse = high + (low == -__builtin_inf() ? 0 : __builtin_log1p(__builtin_exp(low - high)));
    }
    out.ce = out.ce_lse - x;
    if (call.label_smoothing != 0) {
      if (dkd) sums.total += x;  // as above
      out.ce = (1 - call.label_smoothing) * out.ce + call.label_smoothing * (out.ce_lse - sums.total / double(call.classes));
    }
  }
  return true;
}

template <class T>
static void zero_gradients(const Row<T>& row, int64_t from) {
  const DivergenceCall& call = *row.call;
  if (call.grad_student.data) {
    const int64_t stride = call.grad_student.class_stride;
    store_zeros<T>(call.student_width - from, call.grad_student, row.gs + from * stride, stride);
  }
  if (call.grad_teacher.data) {
    const int64_t stride = call.grad_teacher.class_stride;
    store_zeros<T>(call.teacher_width - from, call.grad_teacher, row.gt + from * stride, stride);
  }
}

template <class T>
KD_INLINE Row<T> make_row(const DivergenceCall& call, int64_t index) {
  Row<T> row;
  row.call = &call;
  row.index = index;
  row.s = row_offset(call.rows, call.student, index);
  row.t = row_offset(call.rows, call.teacher, index);
  row.gs = call.grad_student.data ? row_offset(call.rows, call.grad_student, index) : 0;
  row.gt = call.grad_teacher.data ? row_offset(call.rows, call.grad_teacher, index) : 0;
  row.inverse_t = T(1) / row_value<T>(call.row_temperature, index, T(call.temperature));
  row.label = -1;
  return row;
}

template <class T>
KD_INLINE bool read_label(Row<T>& row) {
  const DivergenceCall& call = *row.call;
  row.label = call.labels[row.index];
  if (row.label >= 0 && row.label < call.classes) return true;
  call.status->report(row.index, Bad::label);
  return false;
}

// Rows entry: D and stats of one row.
template <class T>
static void forward_row(const DivergenceCall& call, int64_t index) {
  T* rows = static_cast<T*>(call.out_rows);
  T* stats = static_cast<T*>(call.stats);
  Row<T> row = make_row<T>(call, index);
  Prepared<T> prepared;
  rows[index] = 0;
  for (int i = 0; i < kStats; ++i) stats[i * call.rows.count + index] = T(__builtin_nan(""));  // an ignored row: no gradient
  if (call.kind == Kind::dkd && !read_label(row)) return;
  if (!prepare(row, false, prepared) || prepared.ignored || call.zero) return;
  Sweep<T> todo;
  todo.loss = true;
  todo.sums = !is_closed(call.kind) || call.kind == Kind::forward_kl;  // forward KL: sum u, for a teacher's gradient
  todo.hole = call.kind == Kind::dkd ? row.label : -1;
  Stats<T> s = prepared.stats;
  const double swept = sweep_kind(row, todo, s, prepared.kept);
  if (call.kind == Kind::forward_kl) s.sum_v = 0;
  rows[index] = T(call.parameters.scale * (prepared.extra_loss + (prepared.v_factor == 0 ? 0 : prepared.v_factor * swept)));
  const T kept[kStats] = {s.max_x, s.log_x, s.max_z, s.log_z, s.gap, s.sum_v, s.sum_u};
  for (int i = 0; i < kStats; ++i) stats[i * call.rows.count + index] = kept[i];
}

// Rows entry, backward: the gradients of one row from its stats.
template <class T>
static void backward_row(const DivergenceCall& call, int64_t index) {
  const T* kept = static_cast<const T*>(call.stats);
  Row<T> row = make_row<T>(call, index);
  const T upstream = static_cast<const T*>(call.grad_rows)[index];
  const auto at = [&](int i) { return kept[i * call.rows.count + index]; };
  Stats<T> s{at(0), at(1), at(2), at(3), at(4), at(5), at(6)};
  if (s.gap != s.gap || upstream == 0) return zero_gradients(row, 0);
  Sweep<T> todo;
  todo.grad_student = call.grad_student.data;
  todo.grad_teacher = call.grad_teacher.data;
  todo.student_factor = todo.teacher_factor = T(double(upstream) * call.parameters.scale * double(row.inverse_t));
  if (call.kind == Kind::dkd) {
    row.label = call.labels[index];
    todo.hole = row.label;
    todo.v_factor = s.sum_u;  // as prepare_dkd left them
    todo.hole_grad = s.sum_v * todo.student_factor;
  }
  Kept<T> none;
  sweep_kind(row, todo, s, none);
  zero_gradients(row, call.classes);
}

// Sum entry: adds one row's share to (kd, ce) and writes its final gradient.
template <class T>
static void sum_row(const DivergenceCall& call, int64_t index, double& kd, double& ce) {
  Row<T> row = make_row<T>(call, index);
  const double weight = double(row_value<T>(call.row_weight, index, T(1)));
  if (weight == 0) return zero_gradients(row, 0);
  const bool cross_entropy = call.ce_factor != 0, dkd = call.kind == Kind::dkd;
  if ((cross_entropy || dkd) && !read_label(row)) return;
  Prepared<T> prepared;
  if (!prepare(row, cross_entropy, prepared)) return;
  if (prepared.ignored) return zero_gradients(row, 0);
  const bool gs = call.grad_student.data, gt = call.grad_teacher.data;
  Stats<T> s = prepared.stats;
  Sweep<T> todo;
  todo.loss = true;
  todo.hole = dkd ? row.label : -1;
  double swept = 0;
  const bool closed = is_closed(call.kind) && (!gt || call.kind == Kind::binary);
  if (!closed) {
    todo.sums = gs || gt;
    todo.keep_v = gs && !gt && prepared.kept.first;
    swept = sweep_kind(row, todo, s, prepared.kept);
    if (call.kind == Kind::forward_kl) s.sum_v = 0;
    todo.sums = todo.loss = false;
  }
  if (closed || gs || gt) {
    const double factor = call.zero ? 0 : call.kd_factor * weight * call.parameters.scale * double(row.inverse_t);
    todo.grad_student = gs;
    todo.grad_teacher = gt;
    todo.student_factor = todo.teacher_factor = T(factor);
    if (dkd) {
      todo.v_factor = T(prepared.v_factor);
      todo.hole_grad = T(prepared.hole_grad * factor);
    }
    if (cross_entropy) {
      todo.ce_factor = T(call.ce_factor * weight);
      todo.ce_max = T(prepared.ce_max);
      todo.ce_log = T(prepared.ce_lse - prepared.ce_max);
      todo.ce_is_q = prepared.ce_is_q;
      todo.ce_smooth = T(call.label_smoothing / double(call.classes));
      todo.ce_hot = T(1 - call.label_smoothing);
      if (dkd) {  // the hole reads as -inf, so its share of softmax is added here
        const double q1 = __builtin_exp(class_value<T>(call.student, row.s, row.label) - prepared.ce_lse);
        todo.hole_grad += T(call.ce_factor * weight * q1);
      }
    }
    if (todo.keep_v) {
      finish_row(row, todo, s, prepared.kept);
    } else {
      const double loss = sweep_kind(row, todo, s, prepared.kept);
      if (closed) swept = loss;
    }
    zero_gradients(row, call.classes);
  }
  if (!call.zero) kd += weight * call.parameters.scale * (prepared.extra_loss + (prepared.v_factor == 0 ? 0 : prepared.v_factor * swept));
  if (cross_entropy) ce += weight * prepared.ce;
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kdfast

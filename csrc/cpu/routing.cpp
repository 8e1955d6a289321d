// CPU kernels of routing scores and plans. The choice of the k best: routing_topk.h; moves of rows: routing_moves.cpp.
#include "cpu/routing.h"

#include "cpu/routing_topk.h"
#include "cpu/stage.h"
#include "memory.h"
#include "parallel.h"
#include "routing_terms.h"

namespace kdfast {
namespace KD_ISA {
namespace {

// Scratch of one thread for one row; E may be anything.
template <class T>
struct Scratch {
  T *z, *e, *chosen_by, *small;  // small: per chosen expert
  int64_t *keys, *chunk_best;
  int32_t* picked;
};

template <class T>
KD_INLINE Scratch<T> make_scratch(const ScoreCall& call) {
  const int64_t width = padded_to_chunk(call.experts), small = padded_to_chunk(call.k);
  Scratch<T> s;
  T* values = static_cast<T*>(thread_scratch(0, std::size_t(3 * width + 2 * small) * sizeof(T)));
  s.z = values;
  s.e = values + width;
  s.chosen_by = values + 2 * width;
  s.small = values + 3 * width;
  s.keys = static_cast<int64_t*>(thread_scratch(1, std::size_t(width + width / kChunk + 16) * sizeof(int64_t)));
  s.chunk_best = s.keys + width;
  s.picked = static_cast<int32_t*>(thread_scratch(2, std::size_t(call.groups > call.k ? call.groups : call.k) * sizeof(int32_t)));
  return s;
}

template <class T>
static void load_row(const ScoreCall& call, int64_t row, T* out) {
  Logits logits;
  logits.data = const_cast<void*>(call.logits);
  logits.dtype = call.dtype;
  load_logits(logits, row * call.row_stride, call.expert_stride, call.experts, out);
}

// The number types of routing_terms.h here: a vector, and a single value.
template <class T>
struct VectorOps {
  using N = Vec<T>;
  KD_INLINE N set(double value) { return splat<T>(T(value)); }
  template <class M>
  KD_INLINE N select(M mask, N a, N b) {
    return mask ? a : b;
  }
  KD_INLINE N abs(N a) { return vabs<T>(a); }
  KD_INLINE N min(N a, N b) { return vmin(a, b); }
  KD_INLINE N max(N a, N b) { return vmax(a, b); }
  KD_INLINE N exp(N a) { return vexp<T>(a); }
  KD_INLINE N log(N a) { return vlog<T>(a); }
  KD_INLINE N log1p(N a) { return vlog1p<T>(a); }
  KD_INLINE N sqrt(N a) {
    for (int lane = 0; lane < kWidth<T>; ++lane) a[lane] = T(__builtin_sqrt(double(a[lane])));
    return a;
  }
};
struct ScalarOps {
  using N = double;
  KD_INLINE N set(double value) { return value; }
  KD_INLINE N select(bool mask, N a, N b) { return mask ? a : b; }
  KD_INLINE N abs(N a) { return __builtin_fabs(a); }
  KD_INLINE N max(N a, N b) { return a > b ? a : b; }
  KD_INLINE N exp(N a) { return __builtin_exp(a); }
  KD_INLINE N log1p(N a) { return __builtin_log1p(a); }
};

// What the choice goes by: the score itself (softmax: p) plus the bias; -inf stays -inf.
template <class T>
KD_INLINE void selection_scores(const ScoreCall& call, const T* z, const T* p, T* out) {
  constexpr int W = kWidth<T>;
  const T* bias = static_cast<const T*>(call.bias);
  const Vec<T> none = splat<T>(-T(kInf));
  for (int64_t i = 0; i < call.experts; i += W) {
    const Vec<T> zi = load(z + i), s = selection_score<VectorOps<T>>(call.score, zi, load(p + i));
    store(out + i, zi == none ? none : s);
  }
  if (bias) {
    for (int64_t i = 0; i < call.experts; ++i) out[i] += bias[i];
  }
}

// Groups: keep the best, close the others (-inf; NaN stays, it sorts behind).
template <class T>
static void limit_groups(const ScoreCall& call, Scratch<T>& s) {
  const int64_t size = call.experts / call.groups;
  T* group_score = s.e;  // free by now
  for (int64_t g = 0; g < call.groups; ++g) {
    T first = -T(kInf), second = -T(kInf);
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      const T v = s.chosen_by[i];
      if (v > first) {
        second = first;
        first = v;
      } else if (v > second) {
        second = v;
      }
    }
    group_score[g] = call.bias && size > 1 ? first + second : first;
  }
  top_k(group_score, call.groups, call.topk_groups, s.picked, s.keys, s.chunk_best);
  for (int64_t g = 0; g < call.groups; ++g) {
    bool open = false;
    for (int64_t j = 0; j < call.topk_groups; ++j) open |= s.picked[j] == g;
    for (int64_t i = g * size; !open && i < (g + 1) * size; ++i) {
      s.chosen_by[i] = s.chosen_by[i] == s.chosen_by[i] ? -T(kInf) : s.chosen_by[i];
    }
  }
}

// Weights of the chosen from their log-scores l[0, alive); also pi_j = s_j^q / sum s^q and |s| / (|s| + eps).
template <class T>
KD_INLINE T weigh(const ScoreCall& call, int64_t alive, const T* l, T* weight, T* pi) {
  constexpr int W = kWidth<T>;
  const double q = call.score == Score::softmax_after_topk ? 1.0 : call.norm;
  if (q == 0) {
    for (int64_t i = 0; i < alive; i += W) store(weight + i, vexp<T>(load(l + i)) * T(call.scale));
    return 0;
  }
  T best = l[0];
  for (int64_t j = 1; j < alive; ++j) best = l[j] > best ? l[j] : best;
  if (best == -T(kInf)) best = 0;  // every score underflowed
  double sum = 0;
  for (int64_t i = 0; i < alive; i += W) store(pi + i, vexp<T>((load(l + i) - best) * T(q)));
  for (int64_t j = 0; j < alive; ++j) sum += double(pi[j]);
  const double norm = q == 1 ? sum : __builtin_exp(__builtin_log(sum) / q);  // |s|_q / exp(best)
  double share = 1, factor = call.scale / norm;
  if (call.eps != 0) {
    const double size = norm * __builtin_exp(double(best));
    share = size / (size + call.eps);
    factor *= share;
  }
  if (q == 1) {
    for (int64_t i = 0; i < alive; i += W) store(weight + i, load(pi + i) * T(factor));
  } else {
    for (int64_t i = 0; i < alive; i += W) store(weight + i, vexp<T>(load(l + i) - best) * T(factor));
  }
  for (int64_t i = 0; i < alive; i += W) store(pi + i, load(pi + i) * T(1 / sum));
  return T(share);
}

// One logit.
template <class T>
KD_INLINE T logit_at(const ScoreCall& call, int64_t row, int64_t expert) {
  const int64_t at = row * call.row_stride + expert * call.expert_stride;
  switch (call.dtype) {
    case Dtype::f32: return T(static_cast<const float*>(call.logits)[at]);
    case Dtype::bf16: return T(load_one(static_cast<const BFloat16*>(call.logits) + at));
    case Dtype::f16: return T(load_one(static_cast<const Half*>(call.logits) + at));
    case Dtype::f64: return T(static_cast<const double*>(call.logits)[at]);
  }
  return 0;
}

template <class T>
static void chosen_log_scores(const ScoreCall& call, int64_t row, const int32_t* ids, int64_t alive, T lse, T* out) {
  constexpr int W = kWidth<T>;
  for (int64_t j = 0; j < alive; ++j) out[j] = logit_at<T>(call, row, ids[j]);
  for (int64_t j = alive; j % W; ++j) out[j] = 0;
  for (int64_t i = 0; i < alive; i += W) store(out + i, log_score<VectorOps<T>>(call.score, load(out + i), splat<T>(lse)));
}

template <class T>
static bool has_nan(const T* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (values[i] != values[i]) return true;
  }
  return false;
}

template <class T>
static void forward_row(const ScoreCall& call, int64_t row, Scratch<T>& s, int32_t* counts, T* probs) {
  constexpr int W = kWidth<T>;
  const int64_t E = call.experts, k = call.k, padded = (E + W - 1) / W * W;
  int32_t* ids = call.ids + row * k;
  T* weights = static_cast<T*>(call.weights) + row * k;
  T* lse = static_cast<T*>(call.lse) + row;
  if (call.mask && !call.mask[row]) {
    for (int64_t j = 0; j < k; ++j) ids[j] = -1, weights[j] = 0;
    *lse = 0;
    call.alive[row] = 0;
    return;
  }
  load_row(call, row, s.z);
  for (int64_t i = E; i < padded; ++i) s.z[i] = -T(kInf);
  Vec<T> most = splat<T>(-T(kInf));
  for (int64_t i = 0; i < padded; i += W) most = vmax(most, load(s.z + i));
  const T top = greatest_lane(most);
  Vec<T> sum = splat<T>(0);
  for (int64_t i = 0; i < padded; i += W) {
    const Vec<T> e = vexp<T>(load(s.z + i) - top);
    store(s.e + i, e);
    sum += e;
  }
  const double total = double(add_lanes(sum));  // NaN: a NaN or +inf among the logits, or nothing but -inf
  const bool bad = !(total < double(kInf));
  if (bad && call.status) return call.status->report(row, top == -T(kInf) && !has_nan(s.z, E) ? Bad::label : Bad::student);
  if (!bad) {
    *lse = T(double(top) + __builtin_log(total));
    const T inverse_sum = T(1 / total);
    for (int64_t i = 0; i < padded; i += W) store(s.e + i, load(s.e + i) * inverse_sum);  // p
    for (int64_t i = 0; i < E; ++i) probs[i] += s.e[i];
    selection_scores(call, s.z, s.e, s.chosen_by);
  } else {
    *lse = T(__builtin_nan(""));
    for (int64_t i = 0; i < E; ++i) {
      probs[i] = T(__builtin_nan(""));
      s.chosen_by[i] = s.z[i];
    }
  }
  if (call.groups > 1) limit_groups(call, s);
  top_k(s.chosen_by, E, k, ids, s.keys, s.chunk_best);
  int64_t alive = 0;
  while (alive < k && s.chosen_by[ids[alive]] > -T(kInf)) ++alive;
  for (int64_t j = 0; j < k; ++j) ++counts[ids[j]];
  call.alive[row] = bad ? 0 : int32_t(alive);
  T* l = s.small;
  if (bad) {
    for (int64_t j = 0; j < k; ++j) weights[j] = T(__builtin_nan(""));
    return;
  }
  if (call.score == Score::mean || call.score == Score::logits) {
    for (int64_t j = 0; j < alive; ++j) weights[j] = call.score == Score::mean ? T(1.0 / double(k)) : T(call.scale) * s.z[ids[j]];
  } else if (alive) {
    chosen_log_scores(call, row, ids, alive, *lse, l);
    weigh(call, alive, l, s.e, l + padded_to_chunk(k));  // s.e is as long as l is padded
    for (int64_t j = 0; j < alive; ++j) weights[j] = s.e[j];
  }
  for (int64_t j = alive; j < k; ++j) weights[j] = 0;
}

template <class T>
static void backward_row(const ScoreCall& call, int64_t row, Scratch<T>& s) {
  constexpr int W = kWidth<T>;
  const int64_t E = call.experts, k = call.k, padded = (E + W - 1) / W * W;
  const int32_t* ids = call.ids + row * k;
  const T lse = static_cast<const T*>(call.lse)[row];
  Logits out;
  out.data = call.grad_logits;
  out.dtype = call.dtype;
  if (ids[0] < 0 || lse != lse) return store_zeros<T>(E, out, row * E, 1);
  T* dl = s.small;
  const int64_t alive = call.alive[row];
  double total = 0;  // sum of dl: what the softmax of ALL experts gives back
  const T* dw = call.grad_weights && alive ? static_cast<const T*>(call.grad_weights) + row * k : nullptr;
  if (dw && call.score == Score::logits) {
    for (int64_t j = 0; j < alive; ++j) dl[j] = T(call.scale) * dw[j];
  } else if (dw && call.score != Score::mean) {
    T* pi = s.small + padded_to_chunk(k);
    T* w = s.e;
    chosen_log_scores(call, row, ids, alive, lse, dl);
    const T share = weigh(call, alive, dl, w, pi);
    double inner = 0;
    for (int64_t j = 0; j < alive; ++j) inner += double(w[j]) * double(dw[j]);
    const bool normed = share != 0;
    for (int64_t j = 0; j < alive; ++j) {
      double d = double(w[j]) * double(dw[j]) - (normed ? double(pi[j]) * double(share) * inner : 0);
      total += d;
      if (call.score == Score::sigmoid || call.score == Score::sqrt_softplus) {
        d *= log_score_slope<ScalarOps>(call.score, double(logit_at<T>(call, row, ids[j])));
      }
      dl[j] = T(d);
    }
    // Normalised without eps the sum is 0: the other experts get nothing, and their probabilities are not needed.
    if (call.score != Score::softmax || (call.norm != 0 && call.eps == 0)) total = 0;
  } else {
    dw = nullptr;
  }
  const T* h = static_cast<const T*>(call.grad_mean);
  double shift = (call.grad_lse ? double(static_cast<const T*>(call.grad_lse)[row]) : 0) - total;
  T* g = s.e;
  if (h || shift != 0) {
    load_row(call, row, s.z);
    for (int64_t i = E; i < padded; ++i) s.z[i] = -T(kInf);
    const T inverse = T(1 / double(call.kept ? call.kept : 1));
    if (h) {
      double inner = 0;
      for (int64_t i = 0; i < padded; i += W) store(g + i, vexp<T>(load(s.z + i) - lse));
      Vec<T> dot = splat<T>(0);
      int64_t i = 0;
      for (; i + W <= E; i += W) dot += load(g + i) * load(h + i);
      inner = sum_lanes_double<T>(dot);
      for (; i < E; ++i) inner += double(g[i]) * double(h[i]);
      shift -= inner * double(inverse);
      for (i = 0; i < E; ++i) g[i] *= T(shift) + h[i] * inverse;
    } else {
      for (int64_t i = 0; i < padded; i += W) store(g + i, vexp<T>(load(s.z + i) - lse) * T(shift));
    }
    for (int64_t j = 0; dw && j < alive; ++j) g[ids[j]] += dl[j];
    store_logits(g, E, out, row * E, 1);
    return;
  }
  store_zeros<T>(E, out, row * E, 1);
  for (int64_t j = 0; dw && j < alive; ++j) store_logits(dl + j, 1, out, row * E + ids[j], 1);
}

template <class T>
static void forward_blocks(const ScoreCall& call) {
  const int64_t per_block = score_block(call.rows), blocks = (call.rows + per_block - 1) / per_block;
  const int64_t work = per_block * (call.experts + 64);
  parallel_for(blocks, work >= 16384 ? 1 : (16384 + work - 1) / work, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch = make_scratch<T>(call);
    for (int64_t block = begin; block < end; ++block) {
      int32_t* counts = call.partial_counts + block * call.experts;
      T* probs = static_cast<T*>(call.partial_probs) + block * call.experts;
      std::memset(counts, 0, std::size_t(call.experts) * sizeof(int32_t));
      std::memset(static_cast<void*>(probs), 0, std::size_t(call.experts) * sizeof(T));
      const int64_t stop = (block + 1) * per_block < call.rows ? (block + 1) * per_block : call.rows;
      for (int64_t row = block * per_block; row < stop; ++row) forward_row<T>(call, row, scratch, counts, probs);
    }
  });
}

template <class T>
static void backward_blocks(const ScoreCall& call) {
  const int64_t grain = 16384 / (call.experts + 64) + 1;
  parallel_for(call.rows, grain, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch = make_scratch<T>(call);
    for (int64_t row = begin; row < end; ++row) backward_row<T>(call, row, scratch);
  });
}

// ---------------------------------------------------------------- plan
KD_INLINE int64_t bin_of(const PlanCall& call, int64_t slot) {  // E: dropped
  const int32_t id = call.ids[slot];
  if (id < -1 || id >= call.experts) {
    if (call.status) call.status->report(slot, Bad::label);
    return call.experts;
  }
  return id < 0 || (call.keep && !call.keep[slot]) ? call.experts : id;
}

KD_INLINE void place(const PlanCall& call, int64_t slot, int64_t expert, int64_t rank) {
  const int64_t row = call.offsets[expert] + rank;
  call.order[row] = int32_t(slot);
  call.inverse[slot] = int32_t(row);
  call.row_slot[call.padded_offsets[expert] + rank] = int32_t(slot);
}

// counts -> both prefix sums, block_expert, and -1 where nothing will be written.
static void lay_out(const PlanCall& call) {
  const int64_t slots = call.rows * call.k;
  int64_t row = 0, padded = 0, block = 0;
  for (int64_t e = 0; e < call.experts; ++e) {
    call.offsets[e] = int32_t(row);
    call.padded_offsets[e] = int32_t(padded);
    const int64_t n = call.counts[e], need = (n + call.block - 1) / call.block;
    for (int64_t b = 0; b < need; ++b) call.block_expert[block++] = int32_t(e);
    for (int64_t i = padded + n; i < padded + need * call.block; ++i) call.row_slot[i] = -1;
    row += n;
    padded += need * call.block;
  }
  call.offsets[call.experts] = int32_t(row);
  call.padded_offsets[call.experts] = int32_t(padded);
  for (int64_t i = row; i < slots; ++i) call.order[i] = -1;
  for (int64_t i = padded; i < call.row_slots; ++i) call.row_slot[i] = -1;
  for (int64_t b = block; b < call.blocks; ++b) call.block_expert[b] = -1;
}

// With ranks in choice order the kept slots of an expert are no prefix in slot order: two serial walks.
static void plan_choice(const PlanCall& call) {
  const int64_t slots = call.rows * call.k;
  int32_t* next = call.histogram;
  std::memset(next, 0, std::size_t(call.experts + 1) * sizeof(int32_t));
  std::memset(call.counts, 0, std::size_t(call.experts) * sizeof(int32_t));
  for (int64_t j = 0; j < call.k; ++j) {
    for (int64_t n = 0; n < call.rows; ++n) {
      const int64_t slot = n * call.k + j, e = bin_of(call, slot);
      const int32_t rank = e < call.experts ? next[e]++ : -1;
      call.position[slot] = rank;
      if (rank >= 0 && (!call.capacity || rank < call.capacity)) ++call.counts[e];
    }
  }
  lay_out(call);
  std::memset(next, 0, std::size_t(call.experts) * sizeof(int32_t));
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int32_t rank = call.position[slot];
    call.inverse[slot] = -1;
    if (rank >= 0 && (!call.capacity || rank < call.capacity)) {
      const int64_t e = call.ids[slot];
      place(call, slot, e, next[e]++);
    }
  }
}

static void plan_token(const PlanCall& call) {
  const int64_t slots = call.rows * call.k, per_block = plan_block(slots), blocks = (slots + per_block - 1) / per_block;
  const int64_t bins = call.experts + 1;
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      int32_t* counts = call.histogram + b * bins;
      std::memset(counts, 0, std::size_t(bins) * sizeof(int32_t));
      const int64_t stop = (b + 1) * per_block < slots ? (b + 1) * per_block : slots;
      for (int64_t slot = b * per_block; slot < stop; ++slot) ++counts[bin_of(call, slot)];
    }
  });
  for (int64_t e = 0; e < call.experts; ++e) {  // histogram -> ranks before each block
    int32_t before = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int32_t n = call.histogram[b * bins + e];
      call.histogram[b * bins + e] = before;
      before += n;
    }
    call.counts[e] = call.capacity && before > call.capacity ? int32_t(call.capacity) : before;
  }
  lay_out(call);
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      int32_t* next = call.histogram + b * bins;
      const int64_t stop = (b + 1) * per_block < slots ? (b + 1) * per_block : slots;
      for (int64_t slot = b * per_block; slot < stop; ++slot) {
        const int64_t e = bin_of(call, slot);
        const int32_t rank = e < call.experts ? next[e]++ : -1;
        call.position[slot] = rank;
        call.inverse[slot] = -1;
        if (rank >= 0 && (!call.capacity || rank < call.capacity)) place(call, slot, e, rank);
      }
    }
  });
}

}  // namespace

void score_forward(const ScoreCall& call) {
  if (call.f64) {
    forward_blocks<double>(call);
  } else {
    forward_blocks<float>(call);
  }
}

void score_backward(const ScoreCall& call) {
  if (call.f64) {
    backward_blocks<double>(call);
  } else {
    backward_blocks<float>(call);
  }
}

void plan_run(const PlanCall& call) {
  if (call.choice) {
    plan_choice(call);
  } else {
    plan_token(call);
  }
}

}  // namespace KD_ISA
}  // namespace kdfast

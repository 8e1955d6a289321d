// CPU kernels of routing scores and plans. Moves of rows: routing_moves.cpp.
// Top-k works on integer keys that order as the scores do: equal scores by lower index, NaN behind -inf. Small k in float
// filters by a bound and ranks what is left; else the row is cut into chunks, and each of the k rounds takes the greatest
// chunk maximum and looks again at that chunk only.
#include "cpu/routing.h"

#include "cpu/stage.h"
#include "memory.h"
#include "parallel.h"

namespace kdfast {
namespace KD_ISA {
namespace {

using I64 = IVec<double>;
constexpr int kLanes = kWidth<double>;
constexpr int kChunk = 64;
constexpr int64_t kTaken = INT64_MIN;  // below every key

KD_INLINE int64_t padded_to_chunk(int64_t n) { return (n + kChunk - 1) / kChunk * kChunk; }

KD_INLINE I64 load_keys(const int64_t* p) {
  I64 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Greatest key of a chunk; with `below`, of those smaller than it.
template <bool limited>
KD_INLINE int64_t chunk_max(const int64_t* keys, int64_t below) {
  const I64 limit = I64{} + below, none = I64{} + kTaken;
  I64 best[2] = {none, none};
  for (int i = 0; i < kChunk; i += kLanes) {
    I64 v = load_keys(keys + i);
    if (limited) v = v < limit ? v : none;
    I64& b = best[i / kLanes % 2];
    b = v > b ? v : b;
  }
  return greatest_lane(vmax(best[0], best[1]));
}

// float: order-preserving bits above, complement of the index below: one comparison decides value and tie.
KD_INLINE void make_keys(const float* values, int64_t n, int64_t* keys) {
  for (int64_t i = 0; i < n; ++i) {
    const float v = values[i] + 0.0f;  // -0 and 0 tie
    int32_t bits;
    std::memcpy(&bits, &v, 4);
    int32_t key = bits ^ ((bits >> 31) & 0x7fffffff);
    key = v != v ? INT32_MIN + 1 : key;
    keys[i] = int64_t(uint64_t(uint32_t(key)) << 32 | (0xffffffffu - uint32_t(i)));
  }
}
KD_INLINE int64_t index_of(const int64_t*, const int64_t*, int64_t key, float) { return int64_t(0xffffffffu - uint32_t(key)); }

// double: the whole key is the value; the index is that of the first match, in the first chunk that has one.
KD_INLINE void make_keys(const double* values, int64_t n, int64_t* keys) {
  for (int64_t i = 0; i < n; ++i) {
    const double v = values[i] + 0.0;
    int64_t bits;
    std::memcpy(&bits, &v, 8);
    const int64_t key = bits ^ ((bits >> 63) & INT64_MAX);
    keys[i] = v != v ? INT64_MIN + 1 : key;
  }
}
KD_INLINE int64_t index_of(const int64_t* keys, const int64_t* chunk_best, int64_t key, double) {
  int64_t chunk = 0;
  while (chunk_best[chunk] != key) ++chunk;
  int64_t i = chunk * kChunk;
  while (keys[i] != key) ++i;
  return i;
}

// The k greatest of values[0, n): indices in descending order, one after the other. keys has padded_to_chunk(n) entries,
// chunk_best one per chunk.
template <class T>
static void top_k_by_rounds(const T* values, int64_t n, int64_t k, int32_t* out, int64_t* keys, int64_t* chunk_best) {
  const int64_t padded = padded_to_chunk(n), chunks = padded / kChunk;
  make_keys(values, n, keys);
  for (int64_t i = n; i < padded; ++i) keys[i] = kTaken;
  for (int64_t c = 0; c < chunks; ++c) chunk_best[c] = chunk_max<false>(keys + c * kChunk, 0);
  for (int64_t j = 0; j < k; ++j) {
    int64_t best = chunk_best[0];
    for (int64_t c = 1; c < chunks; ++c) best = chunk_best[c] > best ? chunk_best[c] : best;  // no branch to mispredict
    const int64_t index = index_of(keys, chunk_best, best, T(0)), chunk = index / kChunk;
    out[j] = int32_t(index);
    if (sizeof(T) == 4) {
      // Keys are distinct, so the taken ones are those not below this one: nothing is written, and the vector load does not
      // wait for a narrower store before it.
      chunk_best[chunk] = chunk_max<true>(keys + chunk * kChunk, best);
    } else {
      keys[index] = kTaken;
      chunk_best[chunk] = chunk_max<false>(keys + chunk * kChunk, 0);
    }
  }
}

// Indices i of keys[i] >= least, ascending; out has room for one vector more than there are keys.
KD_INLINE int64_t indices_from(const int32_t* keys, int64_t padded, int32_t least, int32_t* out) {
  int64_t found = 0;
#if defined(__AVX512F__)
  __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < padded; i += 16) {
    const __mmask16 mask = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(keys + i), _mm512_set1_epi32(least));
    _mm512_storeu_si512(out + found, _mm512_maskz_compress_epi32(mask, index));
    found += __builtin_popcount(mask);
    index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
  }
#elif defined(__AVX2__)
  const __m256i below = _mm256_set1_epi32(least - 1);  // least is above INT32_MIN
  for (int64_t i = 0; i < padded; i += 8) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i));
    unsigned mask = unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(v, below))));
    for (; mask; mask &= mask - 1) out[found++] = int32_t(i) + __builtin_ctz(mask);
  }
#else
  for (int64_t i = 0; i < padded; ++i) {
    out[found] = int32_t(i);
    found += keys[i] >= least;
  }
#endif
  return found;
}

constexpr int kCandidates = 64;

// The same for float without a chain of rounds. The row is dealt to `subsets` lanes; the k-th greatest of their maxima is no
// greater than the k-th greatest of all, and only about k log(subsets / (subsets - k)) / k keys are not below it. Those are
// ranked by counting, each against all. Returns false, and has written nothing, where ties leave more than kCandidates.
template <int subsets>
KD_INLINE bool top_k_by_rank(const float* values, int64_t n, int64_t k, int32_t* out, int32_t* keys, int32_t* candidates) {
  using I = IVec<float>;
  constexpr int W = kWidth<float>, parts = subsets / W;
  const int64_t padded = padded_to_chunk(n);
  const I lowest = I{} + INT32_MIN;
  I best[parts];
  for (int a = 0; a < parts; ++a) best[a] = lowest;
  for (int64_t i = 0; i < padded; i += subsets) {
    for (int a = 0; a < parts; ++a) {
      const int64_t at = i + a * W;
      Vec<float> v = splat(0.0f);
      if (at + W <= n) {
        v = load(values + at) + 0.0f;  // -0 and 0 tie
      } else {
        for (int lane = 0; lane < W; ++lane) v[lane] = at + lane < n ? values[at + lane] + 0.0f : 0.0f;
      }
      I key = bits_of<float>(v);
      key ^= (key >> 31) & INT32_MAX;  // orders as the values do
      key = v != v ? I{} + (INT32_MIN + 1) : key;
      if (at + W > n) {
        for (int lane = 0; lane < W; ++lane) key[lane] = at + lane < n ? key[lane] : INT32_MIN;
      }
      std::memcpy(keys + at, &key, sizeof key);
      best[a] = key > best[a] ? key : best[a];
    }
  }
  int32_t maxima[subsets];
  std::memcpy(maxima, best, sizeof maxima);
  I greater[parts] = {};
  for (int i = 0; i < subsets; ++i) {
    const I one = I{} + maxima[i];
    for (int a = 0; a < parts; ++a) greater[a] -= one > best[a];  // true is -1
  }
  I least_of = I{} + INT32_MAX;
  for (int a = 0; a < parts; ++a) {
    const I kept = greater[a] < int32_t(k) ? best[a] : I{} + INT32_MAX;
    least_of = kept < least_of ? kept : least_of;
  }
  const int32_t kth = ~greatest_lane(~least_of);
  const int64_t found = indices_from(keys, padded, kth > INT32_MIN ? kth : INT32_MIN + 1, candidates);
  if (found > kCandidates) return false;
  int64_t packed[kCandidates];
  const int64_t full = (found + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = 0; i < found; ++i) {
    packed[i] = int64_t(uint64_t(uint32_t(keys[candidates[i]])) << 32 | (0xffffffffu - uint32_t(candidates[i])));
  }
  for (int64_t i = found; i < full; ++i) packed[i] = kTaken;
  for (int64_t b = 0; b < full; b += kLanes) {
    const I64 mine = load_keys(packed + b);
    I64 rank = {};
    for (int64_t i = 0; i < found; ++i) rank -= (I64{} + packed[i]) > mine;
    int64_t place[kLanes];
    std::memcpy(place, &rank, sizeof place);
    for (int lane = 0; lane < kLanes && b + lane < found; ++lane) {
      if (place[lane] < k) out[place[lane]] = candidates[b + lane];
    }
  }
  return true;
}

KD_INLINE void top_k(const float* values, int64_t n, int64_t k, int32_t* out, int64_t* keys, int64_t* chunk_best) {
  int32_t* short_keys = reinterpret_cast<int32_t*>(keys);  // padded entries of 8 bytes: room for the keys and the candidates
  int32_t* candidates = short_keys + padded_to_chunk(n);
  const bool done = k <= 8    ? top_k_by_rank<16>(values, n, k, out, short_keys, candidates)
                    : k <= 16 ? top_k_by_rank<32>(values, n, k, out, short_keys, candidates)
                              : false;
  if (!done) top_k_by_rounds(values, n, k, out, keys, chunk_best);
}
KD_INLINE void top_k(const double* values, int64_t n, int64_t k, int32_t* out, int64_t* keys, int64_t* chunk_best) {
  top_k_by_rounds(values, n, k, out, keys, chunk_best);
}

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

// log of the score, from z and the row's log-sum-exp.
template <class T>
KD_INLINE Vec<T> log_score(Score score, Vec<T> z, T lse) {
  const Vec<T> zero = splat<T>(0);
  if (score == Score::sigmoid) return vmin(z, zero) - vlog1p<T>(vexp<T>(-vabs<T>(z)));
  if (score == Score::sqrt_softplus) {
    // log log(1 + e^z) is z to the last bit below -37, where log1p would underflow
    const Vec<T> softplus = vmax(z, zero) + vlog1p<T>(vexp<T>(-vabs<T>(z)));
    const Vec<T> safe = z < T(-37) ? splat<T>(1) : softplus;
    return T(0.5) * (z < T(-37) ? z : vlog<T>(safe));
  }
  return score == Score::softmax ? z - lse : z;
}

// What the choice goes by: the score itself (softmax: p) plus the bias; -inf stays -inf.
template <class T>
KD_INLINE void selection_scores(const ScoreCall& call, const T* z, const T* p, T* out) {
  constexpr int W = kWidth<T>;
  const T* bias = static_cast<const T*>(call.bias);
  const Vec<T> none = splat<T>(-T(kInf));
  for (int64_t i = 0; i < call.experts; i += W) {
    const Vec<T> zi = load(z + i);
    Vec<T> s = zi;
    if (call.score == Score::softmax) {
      s = load(p + i);
    } else if (call.score == Score::sigmoid) {
      const Vec<T> t = vexp<T>(-vabs<T>(zi));
      s = (zi < T(0) ? t : splat<T>(1)) / (t + T(1));
    } else if (call.score == Score::sqrt_softplus) {
      s = vmax(zi, splat<T>(0)) + vlog1p<T>(vexp<T>(-vabs<T>(zi)));
      for (int lane = 0; lane < W; ++lane) s[lane] = T(__builtin_sqrt(double(s[lane])));
    }
    s = zi == none ? none : s;
    store(out + i, s);
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
  for (int64_t i = 0; i < alive; i += W) store(out + i, log_score<T>(call.score, load(out + i), lse));
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
      if (call.score == Score::sigmoid) {
        d /= 1 + __builtin_exp(double(logit_at<T>(call, row, ids[j])));
      } else if (call.score == Score::sqrt_softplus) {
        // d log s / dz = sigmoid(z) / (2 softplus(z)): 1/2 far below zero
        const double z = double(logit_at<T>(call, row, ids[j])), t = __builtin_exp(-z);
        d *= z < -37 ? 0.5 : 0.5 / (1 + t) / (z > 37 ? z : __builtin_log1p(__builtin_exp(z)));
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

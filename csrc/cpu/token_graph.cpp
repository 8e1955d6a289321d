// Selection reads each block of the symmetric Gram matrix twice, along its rows and along its columns, so the caller only
// multiplies the upper half. Most entries fail the comparison with the worst candidate so far; only the rest is inserted.
// Ranking computes the candidates' distances directly (the Gram form loses the digits of near neighbours) and proves the
// choice: if the k-th distance is below what the worst candidate's key says about everybody else, nobody else can be nearer.
// Rows without proof (many near ties, NaN) look at all tokens.
#include "cpu/token_graph.h"

#include "cpu/vec.h"
#include "memory.h"
#include "parallel.h"

namespace kdfast {
namespace KD_ISA {
namespace {

template <class T>
KD_INLINE bool any(IVec<T> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int64_t halves[2];
  std::memcpy(halves, &mask, sizeof halves);
  return (halves[0] | halves[1]) != 0;
#endif
}

// One token's candidates.
template <class T>
struct List {
  T* keys;
  int32_t* ids;
  int32_t* count;
  int capacity;
};

template <class T>
KD_INLINE List<T> list_of(const GraphSelect& call, int64_t token) {
  const int c = call.candidates;
  return {static_cast<T*>(call.keys) + token * c, call.ids + token * c, call.counts + token, c};
}

template <class T>
KD_INLINE T worst(const List<T>& list) {
  return *list.count == list.capacity ? list.keys[list.capacity - 1] : T(kInf);
}

// Sorted insertion by (key, id). Called with key < worst(list), or with a free place.
template <class T>
static void insert(const List<T>& list, T key, int32_t id) {
  int at = *list.count < list.capacity ? (*list.count)++ : list.capacity - 1;
  for (; at > 0 && (key < list.keys[at - 1] || (key == list.keys[at - 1] && id < list.ids[at - 1])); --at) {
    list.keys[at] = list.keys[at - 1];
    list.ids[at] = list.ids[at - 1];
  }
  list.keys[at] = key;
  list.ids[at] = id;
}

// Row r of the block: all its columns but its own token.
template <class T>
static void select_row(const GraphSelect& call, int64_t r) {
  constexpr int U = 4, W = kWidth<T>;
  const T* gram = static_cast<const T*>(call.gram) + r * call.columns;
  const T* norms = static_cast<const T*>(call.norms) + call.first;
  const List<T> list = list_of<T>(call, call.first + r);
  T limit = worst(list);
  auto consider = [&](int64_t c) __attribute__((always_inline)) {
    const T key = norms[c] - 2 * gram[c];
    if (key < limit && c != r) {
      insert(list, key, int32_t(call.first + c));
      limit = worst(list);
    }
  };
  int64_t c = 0;
  for (; c + U * W <= call.columns; c += U * W) {
    IVec<T> hit{};
    for (int u = 0; u < U; ++u) hit |= load(norms + c + u * W) - T(2) * load(gram + c + u * W) < splat(limit);
    if (any<T>(hit))
      for (int64_t i = c; i < c + U * W; ++i) consider(i);
  }
  for (; c < call.columns; ++c) consider(c);
}

// Columns [begin, end) of the block, tokens that are none of its rows: every row is a candidate for them.
template <class T>
static void select_columns(const GraphSelect& call, int64_t begin, int64_t end) {
  constexpr int U = 4, W = kWidth<T>;
  const T* norms = static_cast<const T*>(call.norms);
  for (int64_t c0 = begin; c0 < end; c0 += U * W) {
    const int64_t width = end - c0 < U * W ? end - c0 : U * W;
    T limits[U * W];
    for (int64_t i = 0; i < U * W; ++i) limits[i] = i < width ? worst(list_of<T>(call, call.first + c0 + i)) : -T(kInf);
    for (int64_t r = 0; r < call.rows; ++r) {
      const T* gram = static_cast<const T*>(call.gram) + r * call.columns + c0;
      const T norm = norms[call.first + r];
      if (width == U * W) {
        IVec<T> hit{};
        for (int u = 0; u < U; ++u) hit |= splat(norm) - T(2) * load(gram + u * W) < load(limits + u * W);
        if (!any<T>(hit)) continue;
      }
      for (int64_t i = 0; i < width; ++i) {
        const T key = norm - 2 * gram[i];
        if (!(key < limits[i])) continue;
        const List<T> list = list_of<T>(call, call.first + c0 + i);
        insert(list, key, int32_t(call.first + r));
        limits[i] = worst(list);
      }
    }
  }
}

template <class T>
static void select(const GraphSelect& call) {
  parallel_for(call.rows, 1 + 16384 / call.columns, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) select_row<T>(call, r);
  });
  const int64_t rest = call.columns - call.rows, strip = 4 * kWidth<T>;
  parallel_for((rest + strip - 1) / strip, 1 + 16384 / (strip * call.rows), [&](int64_t begin, int64_t end) {
    const int64_t stop = end * strip < rest ? end * strip : rest;
    select_columns<T>(call, call.rows + begin * strip, call.rows + stop);
  });
}

// A token and its scale.
template <class T>
struct Token {
  const T* values;
  T scale;
};

template <class T>
KD_INLINE Token<T> token_at(const void* tokens, const void* inverse, int64_t width, int64_t i) {
  return {static_cast<const T*>(tokens) + i * width, inverse ? static_cast<const T*>(inverse)[i] : T(1)};
}

template <class T>
static T distance2(Token<T> a, Token<T> b, int64_t width) {
  constexpr int U = 4, W = kWidth<T>;
  Vec<T> total[U] = {};
  int64_t c = 0;
  for (; c + U * W <= width; c += U * W)
    for (int u = 0; u < U; ++u) {
      const Vec<T> d = load(a.values + c + u * W) * a.scale - load(b.values + c + u * W) * b.scale;
      total[u] += d * d;
    }
  for (; c + W <= width; c += W) {
    const Vec<T> d = load(a.values + c) * a.scale - load(b.values + c) * b.scale;
    total[0] += d * d;
  }
  T sum = sum_lanes<T>((total[0] + total[1]) + (total[2] + total[3]));
  for (; c < width; ++c) {
    const T d = a.values[c] * a.scale - b.values[c] * b.scale;
    sum += d * d;
  }
  return sum;
}

// NaN ranks with infinity: after every number, in order of index.
template <class T>
KD_INLINE T rank_key(T d2) {
  return d2 == d2 ? d2 : T(kInf);
}

template <class T>
static void rank_row(const GraphRank& call, int64_t i, T* keys, int32_t* ids) {
  auto token = [&](int64_t j) { return token_at<T>(call.tokens, call.inverse, call.width, j); };
  const Token<T> mine = token(i);
  const int k = int(call.k);
  int32_t found = 0;
  const List<T> best{keys, ids, &found, k};
  auto consider = [&](int32_t j) {
    const T key = rank_key(distance2(mine, token(j), call.width));
    const bool full = found == k;
    if (!full || key < keys[k - 1] || (key == keys[k - 1] && j < ids[k - 1])) insert(best, key, j);
  };
  bool proven = false;
  if (call.candidates > 0) {
    const int64_t base = i * call.candidates;
    const int32_t count = call.counts[i];
    if (count >= k) {
      for (int32_t c = 0; c < count; ++c) consider(call.ids[base + c]);
      // No candidate is missing, or everybody else is farther than the k-th: their key is at least the last one's.
      const double others = double(static_cast<const T*>(call.keys)[base + count - 1]) + double(static_cast<const T*>(call.norms)[i]);
      proven = count == call.n - 1 || (count == call.candidates && double(keys[k - 1]) * (1 + call.slack) < others);
    }
  }
  if (!proven) {
    found = 0;
    for (int64_t j = 0; j < call.n; ++j)
      if (j != i) consider(int32_t(j));
  }
  T* weights = static_cast<T*>(call.weights) + i * k;
  for (int r = 0; r < k; ++r) {
    call.neighbours[i * k + r] = ids[r];
    const T d2 = keys[r] < T(kInf) ? keys[r] : distance2(mine, token(ids[r]), call.width);
    weights[r] = T(__builtin_exp(-double(d2) / (2 * call.sigma)));
  }
}

template <class T>
static void rank(const GraphRank& call) {
  const int64_t seen = call.candidates > 0 ? call.candidates : call.n;
  parallel_for(call.n, 1 + 32768 / (1 + seen * call.width), [&](int64_t begin, int64_t end) {
    T* keys = static_cast<T*>(thread_scratch(0, sizeof(T) * std::size_t(call.k)));
    int32_t* ids = static_cast<int32_t*>(thread_scratch(1, sizeof(int32_t) * std::size_t(call.k)));
    for (int64_t i = begin; i < end; ++i) rank_row<T>(call, i, keys, ids);
  });
}

template <class T>
static void weigh(const EdgeWeights& call) {
  auto token = [&](int64_t j) { return token_at<T>(call.tokens, call.inverse, call.width, j); };
  T* weights = static_cast<T*>(call.weights);
  parallel_for(call.edges, 1 + 32768 / (1 + call.width), [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      const T d2 = distance2(token(call.sources[e]), token(call.targets[e]), call.width);
      weights[e] = T(__builtin_exp(-double(d2) / (2 * call.sigma)));
    }
  });
}

// out[0, width) = g = sum over the token's edges of c (x - other), c = -dL/dA A / sigma, edge by edge in list order.
// Of a normalised token x = r t, r = 1/|t|: dL/dt = r (g - x <x, g>), or r g where r is the constant of a short token.
template <class T>
static void gather_row(const EdgeGradient& call, int64_t i) {
  constexpr int U = 4, W = kWidth<T>;
  auto token = [&](int64_t j) { return token_at<T>(call.tokens, call.inverse, call.width, j); };
  const T* weights = static_cast<const T*>(call.weights);
  const T* grads = static_cast<const T*>(call.grad_weights);
  const Token<T> mine = token(i);
  T* out = static_cast<T*>(call.grad) + i * call.width;
  const int64_t begin = call.starts[i], end = call.starts[i + 1];
  const T factor = T(-1 / call.sigma);
  int64_t c = 0;
  for (; c + U * W <= call.width; c += U * W) {
    Vec<T> total[U] = {}, x[U];
    for (int u = 0; u < U; ++u) x[u] = load(mine.values + c + u * W) * mine.scale;
    for (int64_t e = begin; e < end; ++e) {
      const Vec<T> slope = splat(factor * grads[call.edges[e]] * weights[call.edges[e]]);
      const Token<T> other = token(call.others[e]);
      for (int u = 0; u < U; ++u) total[u] += slope * (x[u] - load(other.values + c + u * W) * other.scale);
    }
    for (int u = 0; u < U; ++u) store(out + c + u * W, total[u]);
  }
  for (; c < call.width; ++c) {
    T total = 0;
    for (int64_t e = begin; e < end; ++e) {
      const Token<T> other = token(call.others[e]);
      total += factor * grads[call.edges[e]] * weights[call.edges[e]] * (mine.values[c] * mine.scale - other.values[c] * other.scale);
    }
    out[c] = total;
  }
  if (!call.inverse) return;
  T along = 0;  // <x, g>
  if (double(mine.scale) < call.largest_inverse) {
    Vec<T> lanes{};
    for (c = 0; c + W <= call.width; c += W) lanes += load(mine.values + c) * load(out + c);
    along = sum_lanes<T>(lanes);
    for (; c < call.width; ++c) along += mine.values[c] * out[c];
    along *= mine.scale * mine.scale;
  }
  for (c = 0; c < call.width; ++c) out[c] = mine.scale * (out[c] - along * mine.values[c]);
}

template <class T>
static void gather(const EdgeGradient& call) {
  parallel_for(call.n, 1 + 16384 / (1 + call.width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) gather_row<T>(call, i);
  });
}

}  // namespace

void graph_select(const GraphSelect& call) { call.f64 ? select<double>(call) : select<float>(call); }
void graph_rank(const GraphRank& call) { call.f64 ? rank<double>(call) : rank<float>(call); }
void edge_weights(const EdgeWeights& call) { call.f64 ? weigh<double>(call) : weigh<float>(call); }
void edge_gradient(const EdgeGradient& call) { call.f64 ? gather<double>(call) : gather<float>(call); }

}  // namespace KD_ISA
}  // namespace kdfast

// Top-k works on integer keys that order as the scores do: equal scores by lower index, NaN behind -inf. Small k in float
// filters by a bound and ranks what is left; else the row is cut into chunks, and each of the k rounds takes the greatest
// chunk maximum and looks again at that chunk only.
#pragma once

#include "cpu/vec.h"

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

}  // namespace
}  // namespace KD_ISA
}  // namespace kdfast

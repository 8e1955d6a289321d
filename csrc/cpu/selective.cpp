// Selective KL on the CPU: one vector lane per pixel. A tile of pixels x all classes of both maps is staged, so main memory is
// read once, in runs of a few hundred bytes per class, whatever the layout; everything else happens on the staged tile:
//   1. per pixel the largest logit, then exp and the sums: log-sum-exps, reliabilities, direction;
//   2. KL of the chosen direction, and both gradients over the staged exponentials;
// and the gradients go back in one run per class. The KL's terms are those of divergence_terms.h (non-negative, no cancellation).
#include "cpu/selective.h"

#include "cpu/divergence_common.h"
#include "memory.h"
#include "parallel.h"

namespace kdfast {
namespace KD_ISA {
namespace {

// Pixels [first, first + count) in stretches of the innermost axis: body(position in the tile, pixel, length).
template <class F>
KD_INLINE void for_stretches(const Rows& rows, int64_t first, int64_t count, const F& body) {
  const int64_t inner = rows.sizes[rows.axes - 1];
  for (int64_t done = 0; done < count;) {
    const int64_t left = inner - (first + done) % inner, n = left < count - done ? left : count - done;
    body(done, first + done, n);
    done += n;
  }
}

template <class T>
KD_INLINE void load_tile(const Logits& logits, const Rows& rows, int64_t first, int64_t count, int64_t classes, int64_t pitch, T* tile) {
  const int64_t stride = logits.row_strides[rows.axes - 1];
  for_stretches(rows, first, count, [&](int64_t at, int64_t pixel, int64_t n) {
    const int64_t offset = row_offset(rows, logits, pixel);
    for (int64_t c = 0; c < classes; ++c) load_logits(logits, offset + c * logits.class_stride, stride, n, tile + c * pitch + at);
  });
  for (int64_t c = 0; c < classes; ++c) {
    for (int64_t i = count; i < pitch; ++i) tile[c * pitch + i] = 0;
  }
}

template <class T>
KD_INLINE void store_tile(const T* tile, const Logits& logits, const Rows& rows, int64_t first, int64_t count, int64_t classes, int64_t pitch,
                          bool stream) {
  const int64_t stride = logits.row_strides[rows.axes - 1];
  for_stretches(rows, first, count, [&](int64_t at, int64_t pixel, int64_t n) {
    const int64_t offset = row_offset(rows, logits, pixel);
    for (int64_t c = 0; c < classes; ++c) {
      const T* from = tile + c * pitch + at;
      const int64_t to = offset + c * logits.class_stride;
      if (stream) {
        stream_logits(from, n, logits, to, stride);
      } else {
        store_logits(from, n, logits, to, stride);
      }
    }
  });
}

// What pass 1 finds for one model, per lane.
template <class T>
struct Side {
  Vec<T> max, sum, log_sum, reliability;
};

template <class T>
KD_INLINE bool any_lane(IVec<T> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  uint64_t words[sizeof mask / 8], any = 0;
  std::memcpy(words, &mask, sizeof mask);
  for (const uint64_t word : words) any |= word;
  return any != 0;
#endif
}

template <class T>
KD_INLINE Vec<T> flip(Vec<T> v, IVec<T> sign) {
  return from_bits<T>(bits_of<T>(v) ^ sign);
}

// Small integers of the lanes as bytes.
template <class T>
KD_INLINE void store_bytes(int8_t* out, IVec<T> lanes, int live) {
  typedef int8_t Bytes __attribute__((vector_size(kWidth<T>)));
  const Bytes bytes = __builtin_convertvector(lanes, Bytes);
  std::memcpy(out, &bytes, std::size_t(live));
}

// hot: the label's logit. unit: temperature 1, where the sums of the KL and of the reliability are the same.
template <class T, bool unit, bool entropy>
KD_INLINE void finish(Side<T>& side, Vec<T> raw_sum, Vec<T> raw_moment, Vec<T> hot) {
  const Vec<T> zero = splat<T>(0);
  // sum is 0 only where all logits are -inf (not valid), NaN where something is wrong (reported)
  side.log_sum = side.sum > zero ? vlog<T>(side.sum) : side.sum;
  const Vec<T> raw = unit ? side.sum : raw_sum;
  const Vec<T> raw_log = unit ? side.log_sum : (raw > zero ? vlog<T>(raw) : raw);
  side.reliability = entropy ? raw_log - raw_moment / raw : (side.max - hot) + raw_log;
}

template <class T, bool unit, bool entropy>
static void tile(const SelectiveCall& call, int64_t block) {
  using O = VectorOps<T>;
  using V = Vec<T>;
  using I = IVec<T>;
  constexpr int W = kWidth<T>;
  const int64_t C = call.classes, size = selective_tile(C), first = block * size;
  const int64_t count = call.rows.count - first < size ? call.rows.count - first : size;
  // one vector more than needed where classes would otherwise meet in the same cache sets
  const int64_t padded = (count + W - 1) / W * W, pitch = padded * int64_t(sizeof(T)) % 512 ? padded : padded + W;
  const std::size_t bytes = std::size_t(C * pitch) * sizeof(T);
  T* a = static_cast<T*>(thread_scratch(0, bytes));  // logits, then exponentials, then gradient
  T* b = static_cast<T*>(thread_scratch(1, bytes));
  T* gaps = static_cast<T*>(thread_scratch(2, bytes));  // (b - a) / T
  load_tile(call.a, call.rows, first, count, C, pitch, a);
  load_tile(call.b, call.rows, first, count, C, pitch, b);
  const V zero = splat<T>(0), negative_inf = splat<T>(-T(kInf)), inverse_t = splat<T>(T(1 / call.temperature));
  const V scale_a = splat<T>(T(call.scale_a)), scale_b = splat<T>(T(call.scale_b));
  T* reliability_a = static_cast<T*>(call.reliability_a) + first;
  T* reliability_b = static_cast<T*>(call.reliability_b) + first;
  const int64_t next = first + size < call.rows.count ? first + size : first;
  const int inner = call.rows.axes - 1;
  const Ahead of_a = beneath(call.a, call.a.row_strides[inner], row_offset(call.rows, call.a, next));
  const Ahead of_b = beneath(call.b, call.b.row_strides[inner], row_offset(call.rows, call.b, next));
  const uintptr_t size_a = uintptr_t(kItemSize[int(call.a.dtype)]), size_b = uintptr_t(kItemSize[int(call.b.dtype)]);
  V loss_a = zero, loss_b = zero;  // per lane: at most a few dozen pixels each
  I n_valid = {}, n_to_a = {}, n_to_b = {};
  for (int64_t group = 0; group < count; group += W) {
    const int live = int(count - group < W ? count - group : W);
    T *ag = a + group, *bg = b + group, *gg = gaps + group;
    alignas(64) T hot_as[W] = {}, hot_bs[W] = {}, in_v[W] = {};
    for (int i = 0; i < live; ++i) {
      const int64_t y = call.labels[first + group + i];
      if (y == call.ignore_index) continue;
      if (y < 0 || y >= C) {
        call.status->report(first + group + i, Bad::label);
        continue;
      }
      in_v[i] = 1;
      hot_as[i] = ag[y * pitch + i];
      hot_bs[i] = bg[y * pitch + i];
    }
    const V hot_a = load(hot_as), hot_b = load(hot_bs);
    I valid = load(in_v) > zero;
    I to_a = {}, to_b = {};
    Side<T> sa, sb;
    sa.reliability = sb.reliability = zero;
    if (any_lane<T>(valid)) {
      sa.max = sb.max = negative_inf;
      for (int64_t c = 0; c < C; ++c) {
        sa.max = vmax(sa.max, load(ag + c * pitch));
        sb.max = vmax(sb.max, load(bg + c * pitch));
      }
      const V shift_a = sa.max == negative_inf ? zero : sa.max, shift_b = sb.max == negative_inf ? zero : sb.max;
      sa.sum = sb.sum = zero;
      V raw_a = zero, raw_b = zero, moment_a = zero, moment_b = zero;
      const Ahead ahead_a{of_a.from + uintptr_t(group) * size_a, of_a.step}, ahead_b{of_b.from + uintptr_t(group) * size_b, of_b.step};
      for (int64_t c = 0; c < C; ++c) {
        fetch(ahead_a, c);
        fetch(ahead_b, c);
        const V za = load(ag + c * pitch), zb = load(bg + c * pitch), da = za - shift_a, db = zb - shift_b;
        const V ea = vexp_bounded<T>(da * inverse_t), eb = vexp_bounded<T>(db * inverse_t);
        sa.sum += ea;
        sb.sum += eb;
        store(ag + c * pitch, ea);
        store(bg + c * pitch, eb);
        store(gg + c * pitch, (zb - za) * inverse_t);
        const V fa = unit ? ea : vexp_bounded<T>(da), fb = unit ? eb : vexp_bounded<T>(db);
        if (!unit) {
          raw_a += fa;
          raw_b += fb;
        }
        if (entropy) {  // 0 log 0 = 0
          moment_a += fa > zero ? fa * da : zero;
          moment_b += fb > zero ? fb * db : zero;
        }
      }
      const I wrong_a = sa.sum != sa.sum, wrong_b = sb.sum != sb.sum;
      if (any_lane<T>(wrong_a | wrong_b)) {
        for (int i = 0; i < W; ++i) {
          if (wrong_a[i] && valid[i]) call.status->report(first + group + i, Bad::student);
          if (wrong_b[i] && valid[i]) call.status->report(first + group + i, Bad::teacher);
          if (!wrong_a[i] && !wrong_b[i]) continue;
          sa.sum[i] = sb.sum[i] = 1;  // an ignored pixel may hold anything: it must not reach the products below
          for (int64_t c = 0; c < C; ++c) ag[c * pitch + i] = bg[c * pitch + i] = gg[c * pitch + i] = 0;
        }
      }
      valid &= (sa.max > negative_inf) & (sb.max > negative_inf);
      finish<T, unit, entropy>(sa, raw_a, moment_a, hot_a);
      finish<T, unit, entropy>(sb, raw_b, moment_b, hot_b);
      // Compared first, masked after: the other way round GCC 12 folds the two comparisons into a wrong one at -O2.
      to_a = valid & (sb.reliability < sa.reliability);
      to_b = valid & (sa.reliability < sb.reliability);
      sa.reliability = valid ? sa.reliability : zero;
      sb.reliability = valid ? sb.reliability : zero;
    }
    if (live == W) {
      store(reliability_a + group, sa.reliability);
      store(reliability_b + group, sb.reliability);
    } else {
      for (int i = 0; i < live; ++i) {
        reliability_a[group + i] = sa.reliability[i];
        reliability_b[group + i] = sb.reliability[i];
      }
    }
    store_bytes<T>(reinterpret_cast<int8_t*>(call.valid) + first + group, -valid, live);  // a true lane is -1
    store_bytes<T>(call.direction + first + group, to_b - to_a, live);
    n_valid -= valid;
    n_to_a -= to_a;
    n_to_b -= to_b;
    if (!any_lane<T>(to_a | to_b)) {
      for (int64_t c = 0; c < C; ++c) {
        store(ag + c * pitch, zero);
        store(bg + c * pitch, zero);
      }
      continue;
    }
    const V gap = (sb.max - sa.max) * inverse_t + (sb.log_sum - sa.log_sum);
    // 0, not infinity, where all logits are -inf: that pixel's products are multiplied by a scale of 0
    const V inverse_a = sa.sum > zero ? T(1) / sa.sum : zero, inverse_b = sb.sum > zero ? T(1) / sb.sum : zero;
    // One term for both directions: d = log(teacher) - log(learner) changes its sign with the direction.
    const V lane_a = to_a ? scale_a : zero, lane_b = to_b ? scale_b : zero;
    const I sign = to_a ? I{} : sign_bits<T>();
    V loss = zero;
    for (int64_t c = 0; c < C; ++c) {
      const V pa = load(ag + c * pitch) * inverse_a, pb = load(bg + c * pitch) * inverse_b, d = load(gg + c * pitch) - gap;
      const Kl<V> learned = kl<O>(to_a ? pb : pa, to_a ? pa : pb, flip<T>(d, sign));
      loss += learned.term;
      store(ag + c * pitch, learned.difference * lane_a);
      store(bg + c * pitch, learned.difference * lane_b);
    }
    loss_a += to_a ? loss : zero;
    loss_b += to_b ? loss : zero;
  }
  if (call.grad_a.data) store_tile(a, call.grad_a, call.rows, first, count, C, pitch, call.stream);
  if (call.grad_b.data) store_tile(b, call.grad_b, call.rows, first, count, C, pitch, call.stream);
  if (call.stream) stream_fence();
  call.loss[2 * block] = sum_lanes_double<T>(loss_a);
  call.loss[2 * block + 1] = sum_lanes_double<T>(loss_b);
  const I counts[3] = {n_valid, n_to_a, n_to_b};
  for (int k = 0; k < 3; ++k) {
    int64_t total = 0;
    for (int i = 0; i < W; ++i) total += counts[k][i];
    call.count[3 * block + k] = total;
  }
}

}  // namespace

template <class T>
static void run(const SelectiveCall& call) {
  const bool unit = call.temperature == 1;
  const auto work = unit ? (call.entropy ? tile<T, true, true> : tile<T, true, false>)
                         : (call.entropy ? tile<T, false, true> : tile<T, false, false>);
  // about 16k logits of each map a thread at least: below that, waking one costs more than it saves
  const int64_t per_block = selective_tile(call.classes) * call.classes, grain = per_block >= 16384 ? 1 : 16384 / per_block;
  parallel_for(selective_blocks(call), grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) work(call, block);
  });
}

void selective_run(const SelectiveCall& call) {
  if (call.f64) {
    run<double>(call);
  } else {
    run<float>(call);
  }
}

}  // namespace KD_ISA
}  // namespace kdfast

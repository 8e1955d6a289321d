// Scores: a warp holds a row of logits in registers, finds the k best by k rounds of "largest key, then lowest index", and weighs
// them; a grid barrier later the blocks' counts and probabilities are added in block order. One launch forward, one backward.
#include "cuda/routing.h"

#include <cooperative_groups.h>

#include "cuda/device.h"
#include "cuda/together.h"
#include "cuda/values.h"
#include "routing_terms.h"

namespace kdfast {
namespace cuda {

namespace {

constexpr int kWarps = 8;
constexpr unsigned kAll = ~0u;
constexpr float kInfinity = __builtin_huge_valf();

struct RoutingOps {
  using N = float;
  KD_INLINE N set(double value) { return float(value); }
  KD_INLINE N select(bool mask, N a, N b) { return mask ? a : b; }
  KD_INLINE N abs(N a) { return fabsf(a); }
  KD_INLINE N min(N a, N b) { return fminf(a, b); }
  KD_INLINE N max(N a, N b) { return fmaxf(a, b); }
  KD_INLINE N exp(N a) { return expf(a); }
  KD_INLINE N log(N a) { return logf(a); }
  KD_INLINE N log1p(N a) { return log1pf(a); }
  KD_INLINE N sqrt(N a) { return sqrtf(a); }
};

__device__ __forceinline__ float warp_sum(float v) {  // the same bits in every lane
#pragma unroll
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(kAll, v, step);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v = fmaxf(v, __shfl_xor_sync(kAll, v, step));
  return v;
}

// ---------------------------------------------------------------- top-k
// Orders as the values do; NaN behind -inf, taken or absent (0) behind NaN.
__device__ __forceinline__ unsigned order_key(float value) {
  const unsigned bits = __float_as_uint(value + 0.0f);  // -0 and 0 tie
  return value != value ? 1 : bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float value_of(unsigned key) { return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)); }
constexpr unsigned kKeyOfMinusInf = 0x007fffffu;

struct Best {
  unsigned key;
  int index;
};

// Of the values that the warp holds, element lane + 32 v in register v: the largest, the first of equal ones.
template <int V>
__device__ __forceinline__ Best best_of(const unsigned (&keys)[V], int lane) {
  unsigned key = keys[0];
  int at = 0;
#pragma unroll
  for (int v = 1; v < V; ++v) {
    if (keys[v] > key) key = keys[v], at = v;
  }
  const unsigned top = __reduce_max_sync(kAll, key);
  const unsigned index = __reduce_min_sync(kAll, key == top ? unsigned(lane + 32 * at) : 0xffffffffu);
  return {top, int(index)};
}

template <int V>
__device__ __forceinline__ void take(unsigned (&keys)[V], int lane, int index) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (lane + 32 * v == index) keys[v] = 0;
  }
}

// Groups: the best stay, the keys of the others become -inf's; NaN stays, it is behind anyway. scratch [groups] of this warp.
template <int V>
__device__ void limit_groups(const Scores& call, unsigned (&keys)[V], int lane, float* scratch) {
  const int size = int(call.experts / call.groups), groups = int(call.groups);
  const bool two = call.bias && size > 1;
  for (int g = 0; g < groups; ++g) {
    unsigned mine[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int i = lane + 32 * v;
      mine[v] = i / size == g ? max(keys[v], kKeyOfMinusInf) : 0;
    }
    const Best first = best_of(mine, lane);
    float score = value_of(first.key);
    if (two) {
      take(mine, lane, first.index);
      score += value_of(best_of(mine, lane).key);
    }
    if (lane == 0) scratch[g] = score;
  }
  __syncwarp();
  unsigned group_keys[V];
#pragma unroll
  for (int v = 0; v < V; ++v) group_keys[v] = lane + 32 * v < groups ? order_key(scratch[lane + 32 * v]) : 0;
  __syncwarp();
  for (int g = lane; g < groups; g += 32) scratch[g] = 0;  // now: whether the group stays
  __syncwarp();
  for (int j = 0; j < int(call.topk_groups); ++j) {
    const Best best = best_of(group_keys, lane);
    take(group_keys, lane, best.index);
    if (lane == 0) scratch[best.index] = 1;
  }
  __syncwarp();
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int i = lane + 32 * v;
    if (i < call.experts && scratch[i / size] == 0) keys[v] = min(keys[v], kKeyOfMinusInf);
  }
  __syncwarp();
}

// ---------------------------------------------------------------- scores
__device__ __forceinline__ float logit(const Scores& call, int64_t row, int64_t expert) {
  return load_value(call.logits, call.dtype, row * call.row_stride + expert * call.expert_stride);
}

// What the weights of a row's chosen share. With exponent 0 the weights are scale e^l.
struct Norm {
  float exponent, best, factor, inverse_sum, share;
  __device__ float weight(float l) const { return exponent == 0 ? factor * expf(l) : factor * expf(l - best); }
  __device__ float pi(float l) const { return expf((l - best) * exponent) * inverse_sum; }  // s^q / sum s^q
};

// From the log-scores l[0, alive), alive > 0.
__device__ Norm make_norm(const Scores& call, const float* l, int alive, int lane) {
  Norm norm;
  norm.exponent = call.score == Score::softmax_after_topk ? 1.0f : float(call.norm);
  norm.best = 0, norm.factor = float(call.scale), norm.inverse_sum = 0, norm.share = 0;
  if (norm.exponent == 0) return norm;
  float best = -kInfinity;
  for (int j = lane; j < alive; j += 32) best = fmaxf(best, l[j]);
  best = warp_max(best);
  norm.best = best == -kInfinity ? 0 : best;  // every score underflowed
  float sum = 0;
  for (int j = lane; j < alive; j += 32) sum += expf((l[j] - norm.best) * norm.exponent);
  sum = warp_sum(sum);
  const float size = norm.exponent == 1 ? sum : expf(logf(sum) / norm.exponent);  // |s|_q / e^best
  norm.share = 1;
  if (call.eps != 0) {
    const float full = size * expf(norm.best);
    norm.share = full / (full + float(call.eps));
  }
  norm.inverse_sum = 1 / sum;
  norm.factor = float(call.scale) / size * norm.share;
  return norm;
}

template <int V>
__device__ void forward_row(const Scores& call, int64_t row, int lane, float* scratch, int* counts, float (&probs)[V]) {
  const int experts = int(call.experts), k = int(call.k);
  int32_t* ids = call.ids + row * k;
  float* weights = static_cast<float*>(call.weights) + row * k;
  if (call.mask && !call.mask[row]) {
    for (int j = lane; j < k; j += 32) ids[j] = -1, weights[j] = 0;
    if (lane == 0) static_cast<float*>(call.lse)[row] = 0, call.alive[row] = 0;
    return;
  }
  float z[V];
  float top = -kInfinity;
  bool bad = false;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int i = lane + 32 * v;
    z[v] = i < experts ? logit(call, row, i) : -kInfinity;
    bad |= z[v] != z[v] || z[v] == kInfinity;
    top = fmaxf(top, z[v]);  // of a NaN and a number, the number
  }
  top = warp_max(top);
  bad = __any_sync(kAll, bad) || top == -kInfinity;
  float sum = 0, p[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    p[v] = bad ? nanf("") : expf(z[v] - top);
    sum += p[v];
  }
  sum = warp_sum(sum);
  const float lse = top + logf(sum);  // NaN in a bad row
  const float* bias = static_cast<const float*>(call.bias);
  unsigned keys[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int i = lane + 32 * v;
    keys[v] = 0;
    if (i >= experts) continue;
    p[v] /= sum;
    probs[v] += p[v];
    // a bad row goes by its logits, so that NaN stays behind the others; -inf stays what it is
    const float by = bad || z[v] == -kInfinity ? z[v] : selection_score<RoutingOps>(call.score, z[v], p[v]);
    keys[v] = order_key(bias ? by + bias[i] : by);
  }
  if (call.groups > 1) limit_groups(call, keys, lane, scratch);
  int alive = 0;
  for (int j = 0; j < k; ++j) {
    const Best best = best_of(keys, lane);
    take(keys, lane, best.index);
    alive += best.key > kKeyOfMinusInf;
    if (lane == j % 32) {  // the same lane reads it below
      ids[j] = best.index;
      atomicAdd(counts + best.index, 1);
    }
  }
  if (lane == 0) {
    static_cast<float*>(call.lse)[row] = bad ? nanf("") : lse;
    call.alive[row] = bad ? 0 : alive;
  }
  if (bad || call.score == Score::mean || call.score == Score::logits) {
    for (int j = lane; j < k; j += 32) {
      const float value = call.score == Score::mean ? 1.0f / float(k) : float(call.scale) * logit(call, row, ids[j]);
      weights[j] = bad ? nanf("") : j < alive ? value : 0;
    }
    return;
  }
  for (int j = lane; j < alive; j += 32) scratch[j] = log_score<RoutingOps>(call.score, logit(call, row, ids[j]), lse);
  __syncwarp();
  const Norm norm = make_norm(call, scratch, alive, lane);
  for (int j = lane; j < k; j += 32) weights[j] = j < alive ? norm.weight(scratch[j]) : 0;
  __syncwarp();  // the next row writes the scratch
}

}  // namespace

template <int V>
__global__ void __launch_bounds__(32 * kWarps, 2) scores_kernel(const __grid_constant__ Scores call) {
  KD_DYNAMIC_SHARED(memory);
  const int experts = int(call.experts), lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  int* counts = reinterpret_cast<int*>(memory);                      // [E]
  float* scratch = reinterpret_cast<float*>(memory) + experts;       // [warps, E]
  for (int e = int(threadIdx.x); e < experts; e += 32 * kWarps) counts[e] = 0;
  __syncthreads();
  float probs[V];
#pragma unroll
  for (int v = 0; v < V; ++v) probs[v] = 0;
  const int64_t per_block = (call.rows + gridDim.x - 1) / gridDim.x, begin = per_block * blockIdx.x;
  const int64_t end = begin + per_block < call.rows ? begin + per_block : call.rows;
  int kept = 0;
  for (int64_t row = begin + warp; row < end; row += kWarps) {
    kept += !call.mask || call.mask[row];
    forward_row(call, row, lane, scratch + warp * experts, counts, probs);
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (lane + 32 * v < experts) scratch[warp * experts + lane + 32 * v] = probs[v];
  }
  __shared__ int kept_of[kWarps];
  if (lane == 0) kept_of[warp] = kept;
  __syncthreads();
  int32_t* block_counts = call.partial_counts + int64_t(blockIdx.x) * (experts + 1);
  float* block_probs = static_cast<float*>(call.partial_probs) + int64_t(blockIdx.x) * experts;
  for (int e = int(threadIdx.x); e < experts; e += 32 * kWarps) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += scratch[w * experts + e];
    block_probs[e] = sum;
    block_counts[e] = counts[e];
  }
  if (threadIdx.x == 0) {
    int rows = 0;
    for (int w = 0; w < kWarps; ++w) rows += kept_of[w];
    block_counts[experts] = rows;
  }
  cooperative_groups::this_grid().sync();  // every block's sums are there
  for (int e = int(blockIdx.x) * kWarps + warp; e < experts; e += int(gridDim.x) * kWarps) {
    int count = 0, rows = 0;
    float sum = 0;
    for (int b = lane; b < int(gridDim.x); b += 32) {
      count += call.partial_counts[int64_t(b) * (experts + 1) + e];
      rows += call.partial_counts[int64_t(b) * (experts + 1) + experts];
      sum += static_cast<const float*>(call.partial_probs)[int64_t(b) * experts + e];
    }
    count = __reduce_add_sync(kAll, count);
    rows = __reduce_add_sync(kAll, rows);
    sum = warp_sum(sum);
    if (lane == 0) {
      call.counts[e] = count;
      call.mean_probs[e] = sum / float(rows > 0 ? rows : 1);
    }
  }
}

// A warp per row; scratch [warps, E]: first the log-scores of the chosen, then their part of the gradient by expert.
__global__ void __launch_bounds__(32 * kWarps, 2) scores_backward_kernel(const __grid_constant__ Scores call) {
  KD_DYNAMIC_SHARED(memory);
  const int experts = int(call.experts), k = int(call.k), lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  float* direct = reinterpret_cast<float*>(memory) + 2 * warp * experts;
  float* logs = direct + experts;
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp;
  if (row >= call.rows) return;  // a whole warp; no barrier of the block follows
  const int32_t* ids = call.ids + row * k;
  const float lse = static_cast<const float*>(call.lse)[row];
  if (ids[0] < 0 || lse != lse) {
    for (int e = lane; e < experts; e += 32) store_value(call.grad_logits, call.dtype, row * experts + e, 0);
    return;
  }
  for (int e = lane; e < experts; e += 32) direct[e] = 0;
  __syncwarp();
  const float* dw = static_cast<const float*>(call.grad_weights);
  const int alive = dw && call.score != Score::mean ? call.alive[row] : 0;
  float total = 0;  // sum over the chosen: what the softmax of all experts gives back
  if (alive > 0 && call.score == Score::logits) {
    for (int j = lane; j < alive; j += 32) direct[ids[j]] = float(call.scale) * dw[row * k + j];
  } else if (alive > 0) {
    for (int j = lane; j < alive; j += 32) logs[j] = log_score<RoutingOps>(call.score, logit(call, row, ids[j]), lse);
    __syncwarp();
    const Norm norm = make_norm(call, logs, alive, lane);
    float inner = 0;
    for (int j = lane; j < alive; j += 32) inner += norm.weight(logs[j]) * dw[row * k + j];
    inner = warp_sum(inner);
    for (int j = lane; j < alive; j += 32) {
      float d = norm.weight(logs[j]) * dw[row * k + j];
      if (norm.exponent != 0) d -= norm.pi(logs[j]) * norm.share * inner;
      total += d;
      direct[ids[j]] = d * log_score_slope<RoutingOps>(call.score, logit(call, row, ids[j]));
    }
    total = warp_sum(total);
    // normalised without eps the sum is 0: the other experts get nothing
    if (call.score != Score::softmax || (norm.exponent != 0 && call.eps == 0)) total = 0;
  }
  __syncwarp();
  const float* h = static_cast<const float*>(call.grad_mean);
  float shift = (call.grad_lse ? static_cast<const float*>(call.grad_lse)[row] : 0) - total;
  float inverse = 0;
  if (h) {
    const int64_t rows = *call.kept_rows;
    inverse = 1 / float(rows > 0 ? rows : 1);
    float inner = 0;
    for (int e = lane; e < experts; e += 32) inner += expf(logit(call, row, e) - lse) * h[e];
    shift -= warp_sum(inner) * inverse;
  }
  const bool everyone = h || shift != 0;
  for (int e = lane; e < experts; e += 32) {
    float g = direct[e];
    if (everyone) g += expf(logit(call, row, e) - lse) * (shift + (h ? h[e] * inverse : 0));
    store_value(call.grad_logits, call.dtype, row * experts + e, g);
  }
}

template <int V>
static void forward(const Scores& call, cudaStream_t stream) {
  const std::size_t shared = std::size_t(kWarps + 1) * call.experts * 4;
  launch_together("scores_kernel", scores_kernel<V>, score_blocks(call.rows), 32 * kWarps, shared, stream, call);
}

int64_t score_blocks(int64_t rows) { return std::max<int64_t>(1, std::min<int64_t>(512, (rows + kWarps - 1) / kWarps)); }

void scores_forward(const Scores& call, cudaStream_t stream) {
  if (call.experts <= 32) return forward<1>(call, stream);
  if (call.experts <= 64) return forward<2>(call, stream);
  if (call.experts <= 128) return forward<4>(call, stream);
  if (call.experts <= 256) return forward<8>(call, stream);
  forward<16>(call, stream);
}

void scores_backward(const Scores& call, cudaStream_t stream) {
  if (call.rows == 0) return;
  const std::size_t shared = std::size_t(2 * kWarps) * call.experts * 4;
  if (shared > 48 << 10) {
    check(cudaFuncSetAttribute(scores_backward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), "scores_backward_kernel");
  }
  launch("scores_backward_kernel", scores_backward_kernel, (call.rows + kWarps - 1) / kWarps, 32 * kWarps, shared, stream, 1, call);
}

}  // namespace cuda
}  // namespace kdfast

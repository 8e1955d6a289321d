// Plans: one launch. Every warp owns a run of consecutive slots and counts their experts (lanes of one expert find each other by
// __match_any_sync, so a count needs no atomic); grid barrier; counts are scanned over blocks; grid barrier; the warp walks its run
// again and each slot knows its rank: slots before it in the run, in the block's warps before, in the blocks before. The result is
// the stable order, whatever the number of blocks.
#include <cooperative_groups.h>

#include "cuda/device.h"
#include "cuda/routing.h"
#include "cuda/together.h"

namespace kdfast {
namespace cuda {

namespace {

constexpr int kWarps = 8;
constexpr unsigned kAll = ~0u;

__device__ __forceinline__ unsigned lanes_below(int lane) { return (1u << lane) - 1; }

struct Bins {
  const PlanCall& call;
  bool choice;  // slots are walked in choice order: all first choices, then all second
  bool ranked;  // positions are known: those within the capacity count

  __device__ int64_t slot(int64_t r) const { return choice ? r % call.rows * call.k + r / call.rows : r; }
  __device__ bool fits(int rank) const { return rank >= 0 && (call.capacity == 0 || rank < call.capacity); }
  __device__ int expert(int64_t slot) const {  // E: dropped
    const int id = call.ids[slot];
    const bool kept = ranked ? fits(call.position[slot]) : id >= 0 && id < call.experts && !(call.keep && !call.keep[slot]);
    return kept ? id : int(call.experts);
  }
};

// Leaves in next[warp, E] how many slots of each expert come before the warp's run, in the whole grid, and the totals in
// call.histogram[blocks of the grid, ...]. Two grid barriers.
__device__ void count_before(const PlanCall& call, const Bins& bins, int64_t begin, int64_t end, int* next, int lane, int warp) {
  const int experts = int(call.experts), blocks = int(gridDim.x);
  int* mine = next + warp * experts;
  for (int e = lane; e < experts; e += 32) mine[e] = 0;
  __syncwarp();
  for (int64_t r = begin; r < end; r += 32) {
    const int e = r + lane < end ? bins.expert(bins.slot(r + lane)) : experts;
    const unsigned same = __match_any_sync(kAll, e);
    if (e < experts && (same & lanes_below(lane)) == 0) mine[e] += __popc(same);  // one lane per expert
    __syncwarp();
  }
  __syncthreads();
  int32_t* own = call.histogram + int64_t(blockIdx.x) * experts;
  for (int e = int(threadIdx.x); e < experts; e += 32 * kWarps) {
    int before = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int n = next[w * experts + e];
      next[w * experts + e] = before;
      before += n;
    }
    own[e] = before;
  }
  cooperative_groups::this_grid().sync();
  for (int e = int(blockIdx.x) * kWarps + warp; e < experts; e += blocks * kWarps) {
    int running = 0;
    for (int first = 0; first < blocks; first += 32) {
      const int b = first + lane, n = b < blocks ? call.histogram[int64_t(b) * experts + e] : 0;
      int sum = n;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(kAll, sum, step);
        if (lane >= step) sum += other;
      }
      if (b < blocks) call.histogram[int64_t(b) * experts + e] = running + sum - n;
      running += __shfl_sync(kAll, sum, 31);
    }
    if (lane == 0) call.histogram[int64_t(blocks) * experts + e] = running;
  }
  cooperative_groups::this_grid().sync();
  for (int e = int(threadIdx.x); e < experts; e += 32 * kWarps) {
    for (int w = 0; w < kWarps; ++w) next[w * experts + e] += own[e];
  }
  __syncthreads();
}

// visit(slot, expert or E, rank) for the slots of a run, in order.
template <class F>
__device__ void walk(const Bins& bins, int64_t begin, int64_t end, int* next, int lane, F visit) {
  const int experts = int(bins.call.experts);
  for (int64_t r = begin; r < end; r += 32) {
    const bool inside = r + lane < end;
    const int64_t slot = inside ? bins.slot(r + lane) : 0;
    const int e = inside ? bins.expert(slot) : experts;
    const unsigned same = __match_any_sync(kAll, e), before = same & lanes_below(lane);
    const int start = e < experts ? next[e] : 0;
    __syncwarp();  // all have read
    if (e < experts && before == 0) next[e] = start + __popc(same);
    __syncwarp();  // before the next 32 read
    if (inside) visit(slot, e, start + __popc(before));
  }
}

// Both prefix sums of the kept counts, by every block for itself: offsets and padded [E + 1] in shared memory. One number carries
// both: the rows below, the padded rows above.
__device__ void lay_out(const PlanCall& call, const int32_t* totals, int* offsets, int* padded, int lane, int warp) {
  __shared__ unsigned long long of_warps[kWarps];
  const int experts = int(call.experts), block = int(call.block);
  unsigned long long carry = 0;
  for (int first = 0; first < experts; first += 32 * kWarps) {
    const int e = first + int(threadIdx.x);
    int n = e < experts ? totals[e] : 0;
    if (call.capacity && n > call.capacity) n = int(call.capacity);
    const unsigned long long mine = (unsigned long long)((n + int64_t(block) - 1) / block * block) << 32 | unsigned(n);
    unsigned long long sum = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const unsigned long long other = __shfl_up_sync(kAll, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) of_warps[warp] = sum;
    __syncthreads();
    unsigned long long before = carry + sum - mine;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += of_warps[w];
      carry += of_warps[w];
    }
    if (e < experts) {
      offsets[e] = int(before & 0xffffffffu);
      padded[e] = int(before >> 32);
      if (blockIdx.x == 0) call.counts[e] = n;
    }
    __syncthreads();  // of_warps is written again
  }
  if (threadIdx.x == 0) {
    offsets[experts] = int(carry & 0xffffffffu);
    padded[experts] = int(carry >> 32);
  }
  __syncthreads();
}

}  // namespace

__global__ void __launch_bounds__(32 * kWarps, 2) plan_kernel(const __grid_constant__ PlanCall call) {
  KD_DYNAMIC_SHARED(memory);
  const int experts = int(call.experts), lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  int* next = reinterpret_cast<int*>(memory);  // [warps, E]
  int* offsets = next + kWarps * experts;      // [E + 1]
  int* padded = offsets + experts + 1;         // [E + 1]
  const int64_t slots = call.rows * call.k, warps = int64_t(gridDim.x) * kWarps;
  const int64_t run = ((slots + warps - 1) / warps + 31) / 32 * 32;
  const int64_t begin = min(slots, (int64_t(blockIdx.x) * kWarps + warp) * run), end = min(slots, begin + run);
  const int64_t me = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, all = int64_t(gridDim.x) * blockDim.x;
  // -1 where no slot will be; the barriers of count_before stand between this and the slots
  for (int64_t i = me; i < slots; i += all) call.order[i] = -1;
  for (int64_t i = me; i < call.row_slots; i += all) call.row_slot[i] = -1;

  const bool choice = call.choice;
  const Bins first{call, choice, false};
  count_before(call, first, begin, end, next, lane, warp);
  if (choice) {  // the kept slots of an expert are no prefix in slot order: ranked again among themselves
    walk(first, begin, end, next + warp * experts, lane, [&](int64_t slot, int e, int rank) { call.position[slot] = e < experts ? rank : -1; });
    cooperative_groups::this_grid().sync();  // all positions are known, and nobody reads the histogram any more
    count_before(call, Bins{call, false, true}, begin, end, next, lane, warp);
  }
  lay_out(call, call.histogram + int64_t(gridDim.x) * experts, offsets, padded, lane, warp);
  walk(Bins{call, false, choice}, begin, end, next + warp * experts, lane, [&](int64_t slot, int e, int rank) {
    if (!choice) call.position[slot] = e < experts ? rank : -1;
    const bool kept = e < experts && (choice || first.fits(rank));
    call.inverse[slot] = kept ? offsets[e] + rank : -1;
    if (!kept) return;
    call.order[offsets[e] + rank] = int32_t(slot);
    call.row_slot[int64_t(padded[e]) + rank] = int32_t(slot);
  });
  for (int64_t b = me; b < call.blocks; b += all) {
    const int64_t row = b * call.block;
    int low = 0, high = experts;  // the first expert whose end is beyond the row
    while (low < high) {
      const int middle = (low + high) / 2;
      if (padded[middle + 1] <= row) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    call.block_expert[b] = row < padded[experts] ? low : -1;
  }
  for (int64_t e = me; e <= experts; e += all) {
    call.offsets[e] = offsets[e];
    call.padded_offsets[e] = padded[e];
  }
}

int64_t plan_blocks(int64_t slots) { return std::max<int64_t>(1, std::min<int64_t>(128, (slots + 1023) / 1024)); }

void plan(const PlanCall& call, cudaStream_t stream) {
  const std::size_t shared = (std::size_t(kWarps + 2) * call.experts + 2) * 4;
  launch_together("plan_kernel", plan_kernel, plan_blocks(call.rows * call.k), 32 * kWarps, shared, stream, call);
}

}  // namespace cuda
}  // namespace kdfast

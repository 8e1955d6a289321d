// Sums and maxima over the threads of a cluster, the same bits in every thread and every run: lanes by butterflies, then warps,
// then blocks in order of their rank.
#pragma once

#include <cooperative_groups.h>

#include "cuda/device.h"

namespace kdfast {
namespace cuda {

constexpr int kMaxCluster = 16, kMaxWarps = 32;

// Shared by the rounds of a kernel. Every round has a slot of its own for what its peers bring: a block may be a round ahead.
template <int rounds, int values>
struct ClusterScratch {
  float warps[values][kMaxWarps];
  float blocks[rounds][kMaxCluster][values];
};

struct Sum {
  static constexpr float start = 0;
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  static constexpr float start = -__builtin_huge_valf();
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// `all` of the cluster's threads call it, and each gets the results in v. Before the first round: one barrier of the cluster,
// since the shared memory of a block that has not begun is not there. After the last none: peers only read their own.
template <class F, int n, int rounds, int values>
__device__ __forceinline__ void cluster_reduce(F f, float (&v)[n], ClusterScratch<rounds, values>& scratch, int round) {
  static_assert(n <= values, "the scratch has too few values");
  const auto cluster = cooperative_groups::this_cluster();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int k = 0; k < n; ++k) {
#pragma unroll
    for (int step = 16; step; step /= 2) v[k] = f(v[k], __shfl_xor_sync(~0u, v[k], step));
    if (lane == 0) scratch.warps[k][warp] = v[k];
  }
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (int k = 0; k < n; ++k) {
      float all = lane < warps ? scratch.warps[k][lane] : F::start;
#pragma unroll
      for (int step = 16; step; step /= 2) all = f(all, __shfl_xor_sync(~0u, all, step));
      if (lane < int(cluster.num_blocks())) *cluster.map_shared_rank(&scratch.blocks[round][cluster.block_rank()][k], lane) = all;
    }
  }
  cluster.sync();  // what the peers wrote here is here; and `warps` is free for the next round
  for (int k = 0; k < n; ++k) {
    v[k] = scratch.blocks[round][0][k];
    for (int block = 1; block < int(cluster.num_blocks()); ++block) v[k] = f(v[k], scratch.blocks[round][block][k]);
  }
}

}  // namespace cuda
}  // namespace kdfast

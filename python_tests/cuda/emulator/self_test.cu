// Kernels that try the emulator itself: what it must run, and what it must refuse.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/device.h"

namespace cg = cooperative_groups;

// out[block] = sum of the block's 64 inputs, by shuffles, then through static and dynamic shared memory.
__global__ void sum_kernel(const int* in, int* out, bool forget_barrier) {
  __shared__ int warp_sums[2];
  KD_DYNAMIC_SHARED(memory);
  int* copy = reinterpret_cast<int*>(memory);
  int sum = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  if (!forget_barrier) __syncthreads();
  if (threadIdx.x == 0) copy[0] = warp_sums[0] + warp_sums[1];
  __syncthreads();
  if (threadIdx.x == 40) out[blockIdx.x] = copy[0];
}

// Every lane: bits of the lanes with its value, their number by ballot, the warp's maximum, what the lanes before have in sum.
__global__ void warp_kernel(const int* in, int* out) {
  const int lane = int(threadIdx.x), v = in[lane];
  out[lane] = int(__match_any_sync(~0u, v));
  out[32 + lane] = __popc(__ballot_sync(~0u, v > 2));
  out[64 + lane] = __reduce_max_sync(~0u, v);
  int before = v;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, before, step);
    if (lane >= step) before += other;
  }
  out[96 + lane] = before - v;
  if (lane < 16) out[128 + lane] = __shfl_sync(0xffffu, v, 15 - lane);  // half a warp
  out[144 + lane] = __syncthreads_count(v > 2);
}

// A cluster of 2: each block reads what the other left in static and in dynamic shared memory.
__global__ void cluster_kernel(int* out, bool leave_early) {
  __shared__ int mine[32];
  KD_DYNAMIC_SHARED(memory);
  int* more = reinterpret_cast<int*>(memory);
  const cg::cluster_group cluster = cg::this_cluster();
  const int i = int(threadIdx.x), rank = int(cluster.block_rank());
  mine[i] = 100 * int(blockIdx.x) + i;
  more[i] = -mine[i];
  cluster.sync();
  if (leave_early && rank == 0) return;
  const int a = cluster.map_shared_rank(mine, 1 - rank)[i], b = cluster.map_shared_rank(more, 1 - rank)[i];
  out[blockIdx.x * 32 + i] = a == -b ? a : -1;
  cluster.sync();
}

// A grid barrier: every block reads what the next one wrote before it.
__global__ void grid_kernel(int* buffer, int* out) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x), n = int(gridDim.x * blockDim.x);
  buffer[i] = i * i;
  cg::this_grid().sync();
  out[i] = buffer[(i + int(blockDim.x)) % n];
}

__global__ void wrong_kernel(int how) {
  if (how == 0) {
    if (threadIdx.x < 32) __syncthreads();  // the others never come
  } else if (how == 1) {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (how == 2) {
    if (threadIdx.x < 8) __shfl_sync(~0u, 1, 0);
  } else if (how == 3) {
    __shfl_sync(1u, 1, 0);
  } else {
    cg::this_grid().sync();
  }
}

__global__ void half_kernel(const float* in, float* out, int n) {
  const int i = int(threadIdx.x);
  if (i < n) out[i] = __half2float(__float2half_rn(in[i])), out[n + i] = __bfloat162float(__float2bfloat16_rn(in[i]));
}

template <class... P, class... A>
static const char* go(void (*kernel)(P...), int blocks, int threads, int shared, int cluster, bool cooperative, A... arguments) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {unsigned(cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = cooperative;
  cudaLaunchConfig_t config = {dim3(unsigned(blocks)), dim3(unsigned(threads)), std::size_t(shared), nullptr, attributes, 2};
  return cudaGetErrorString(cudaLaunchKernelEx(&config, kernel, arguments...));
}

extern "C" {
void set_order(int order) { emulator::order = emulator::Order(order); }
const char* sums(const int* in, int* out, int blocks, bool forget) { return go(sum_kernel, blocks, 64, 4, 1, false, in, out, forget); }
const char* warps(const int* in, int* out) { return go(warp_kernel, 1, 32, 0, 1, false, in, out); }
const char* clusters(int* out, bool early) { return go(cluster_kernel, 4, 32, 128, 2, false, out, early); }
const char* grids(int* buffer, int* out, int blocks) { return go(grid_kernel, blocks, 64, 0, 1, true, buffer, out); }
const char* wrong(int how, int threads, int shared) { return go(wrong_kernel, 2, threads, shared, 1, false, how); }
const char* halves(const float* in, float* out, int n) { return go(half_kernel, 1, 1024, 0, 1, false, in, out, n); }
}

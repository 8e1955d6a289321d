// Which kernel runs a divergence, with what shared memory; the kernels: divergence_kernels.cuh, compiled once per dtype.
#include "cuda/cluster.h"
#include "cuda/divergence.h"
#include "cuda/launch.h"
#include "cuda/packs.h"

namespace kdfast {
namespace cuda {

template <class T>
void divergence_run(const Divergence& call, const DivergencePlan& plan, bool backward, cudaStream_t stream);
template <class T>
int divergence_largest_cluster(int shared);

namespace {

constexpr int kReserved = 4096;    // of the shared memory: ClusterScratch and what the system keeps
constexpr int kHalf = 110 << 10;  // two such blocks fit a multiprocessor of 228 KB, and its registers: one loads while the other computes

int64_t block_bytes(int64_t classes, int cluster, int item) {
  return ((classes + cluster - 1) / cluster + 7) / 8 * 8 * 2 * item;  // whole packs of every dtype
}

DivergencePlan plan(const Divergence& call, const Limits& limits) {
  const int item = kItemSize[int(call.student.dtype)];
  DivergencePlan plan;
  while (plan.cluster < limits.cluster && plan.cluster < 8 && block_bytes(call.classes, plan.cluster, item) > kHalf) plan.cluster *= 2;
  while (plan.cluster < limits.cluster && block_bytes(call.classes, plan.cluster, item) > limits.shared_bytes - kReserved) plan.cluster *= 2;
  plan.shared = std::size_t(block_bytes(call.classes, plan.cluster, item));
  plan.per_block = int(plan.shared / (2 * item));
  plan.wide = call.classes % kPack == 0;
  for (const Logits* operand : {&call.student, &call.teacher, &call.grad_student, &call.grad_teacher}) {
    plan.wide &= rows_aligned(call.rows, *operand);
  }
  return plan;
}

}  // namespace

// One block adds all rows.
__global__ void divergence_total_kernel(const float* kd, const float* ce, int64_t rows, double kd_factor, double ce_factor, float* loss, float* parts) {
  __shared__ double warps[2][kMaxWarps];
  double totals[2] = {0, 0};
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
    totals[0] += kd[row];
    if (ce) totals[1] += ce[row];
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int k = 0; k < 2; ++k) {
    for (int step = 16; step; step /= 2) totals[k] += __shfl_xor_sync(~0u, totals[k], step);
    if (lane == 0) warps[k][warp] = totals[k];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int k = 0; k < 2; ++k) {
    totals[k] = 0;
    for (int i = 0; i < int(blockDim.x / 32); ++i) totals[k] += warps[k][i];
    parts[k] = float(totals[k]);
  }
  // a term of factor 0 is left out: 0 times an infinite divergence is not 0
  *loss = float((kd_factor == 0 ? 0 : kd_factor * totals[0]) + (ce_factor == 0 ? 0 : ce_factor * totals[1]));
}

int64_t divergence_most(const Limits& limits, int item) {
  return limits.cluster == 0 ? 0 : int64_t(limits.shared_bytes - kReserved) / (2 * item) / 8 * 8 * limits.cluster;
}

Limits divergence_limits(int device) {
  Limits limits;
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  if (major < 9) return limits;
  const OnDevice current(device);
  limits.cluster = divergence_largest_cluster<__nv_bfloat16>(limits.shared_bytes - kReserved);
  return limits;
}

static void run(const Divergence& call, const DivergencePlan& plan, bool backward, cudaStream_t stream) {
  switch (call.student.dtype) {
    case Dtype::f32: return divergence_run<float>(call, plan, backward, stream);
    case Dtype::bf16: return divergence_run<__nv_bfloat16>(call, plan, backward, stream);
    case Dtype::f16: return divergence_run<__half>(call, plan, backward, stream);
    case Dtype::f64: break;
  }
  throw std::invalid_argument("student: the CUDA divergence takes no float64");
}

void divergence_forward(const Divergence& call, const Limits& limits, cudaStream_t stream) {
  if (call.classes > divergence_most(limits, kItemSize[int(call.student.dtype)])) {
    throw std::invalid_argument("student: " + std::to_string(call.classes) + " classes do not fit the shared memory of a cluster");
  }
  run(call, plan(call, limits), false, stream);
}

void divergence_backward(const Divergence& call, cudaStream_t stream) { run(call, plan(call, {0, 1}), true, stream); }

void divergence_total(const float* kd, const float* ce, int64_t rows, double kd_factor, double ce_factor, float* loss, float* parts, cudaStream_t stream) {
  launch("divergence_total_kernel", divergence_total_kernel, 1, 1024, 0, stream, 1, kd, ce, rows, kd_factor, ce_factor, loss, parts);
}

}  // namespace cuda
}  // namespace kdfast

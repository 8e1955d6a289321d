// A cluster of blocks owns a row: each block copies its part of both models' logits to shared memory once, and every pass after
// that reads it there. Between the passes a few numbers go round the cluster (cluster.h):
//
//     copy          the largest logit of both                                            reads 2 logits
//     exponentials  their sums, for cross-entropy also at T = 1
//     sums          loss, sum v, sum u; not where sum v is 0 and only the student's gradient is wanted
//     gradients     in their final dtype; there the loss, too                            writes 1 or 2
//
// So a (student, teacher) pair of bf16 logits costs 6 bytes with its gradient, whatever the kind; Triton's kernels read rows
// beyond their tile two or three times (10 or 14). Nothing waits for the device, no atomics, every sum in a fixed order.
#pragma once

#include "cuda/divergence_rows.cuh"
#include "cuda/launch.h"

namespace kdfast {
namespace cuda {

template <Kind kind, class T>
__global__ void __launch_bounds__(kThreads, 2) divergence_forward_kernel(const __grid_constant__ Divergence call, int per_block, bool wide) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // clusters
  KD_DYNAMIC_SHARED(memory);
  __shared__ ClusterScratch<4, 4> scratch;
  const auto cluster = cooperative_groups::this_cluster();
  const int rank = int(cluster.block_rank()), blocks = int(cluster.num_blocks());
  const int64_t index = blockIdx.x / blocks;
  const int64_t s = row_start(call.rows, call.student, index), t = row_start(call.rows, call.teacher, index);
  const int64_t gs = row_start(call.rows, call.grad_student, index), gt = row_start(call.rows, call.grad_teacher, index);
  const int64_t me = rank * kThreads + threadIdx.x, all = int64_t(blocks) * kThreads;
  const bool first = me == 0;
  constexpr bool closed = is_closed(kind);
  const float weight = call.row_weight ? call.row_weight[index] : 1;
  const bool cross = call.ce_factor != 0, need_s = call.grad_student.data, need_t = call.grad_teacher.data;
  fill_rest(call, gs, gt, me, all);
  if (weight == 0) {  // not read; the whole cluster leaves
    fill_row(call, gs, gt, 0, me, all);
    if (first) {
      call.kd[index] = 0;
      if (cross) call.ce[index] = 0;
    }
    return;
  }

  RowState row;
  row.inverse_t = 1 / (call.row_temperature ? call.row_temperature[index] : call.temperature);
  Part part{int64_t(rank) * per_block, per_block, wide};
  if (part.first + part.count > call.classes) part.count = part.first < call.classes ? int(call.classes - part.first) : 0;
  T* xs = reinterpret_cast<T*>(memory);
  T* zs = xs + per_block;
  float tops[2];
  tops[0] = stage(static_cast<const T*>(call.student.data) + s + part.first, xs, part);
  tops[1] = stage(static_cast<const T*>(call.teacher.data) + t + part.first, zs, part);
  cluster.sync();  // from here on every block of the cluster has begun
  cluster_reduce(Max(), tops, scratch, 0);
  const bool none_x = tops[0] == Max::start, none_z = tops[1] == Max::start;
  row.max_x = none_x ? 0 : tops[0];
  row.max_z = none_z ? 0 : tops[1];

  const bool raw = cross && row.inverse_t != 1;
  float sums[4] = {0, 0, 0, 0};
  add_exponentials(xs, zs, part, row, raw, cross && call.label_smoothing != 0, sums);
  cluster_reduce(Sum(), sums, scratch, 1);
  float x_label = 0;
  bool wrong = false;
  if (cross) {
    row.label = call.labels[index];
    wrong = row.label < 0 || row.label >= call.classes;  // never an address
    if (!wrong) x_label = to_float(static_cast<const T*>(call.student.data)[s + row.label]);
  }
  const float inf = -Max::start;
  const bool bad = wrong || sums[0] != sums[0] || sums[1] != sums[1] || row.max_x == inf || row.max_z == inf;
  if (bad || none_x || none_z) {  // NaN for what has no value, 0 for a row of -inf; the whole cluster leaves
    const float value = bad ? nanf("") : 0;
    fill_row(call, gs, gt, value, me, all);
    if (first) {
      call.kd[index] = value;
      if (cross) call.ce[index] = value;
      if (call.per_row) {
        for (int i = 0; i < kStats; ++i) call.stats[i * call.rows.count + index] = i == 4 ? (bad ? inf : nanf("")) : 0;
      }
    }
    return;
  }
  row.log_x = logf(sums[0]);
  row.log_z = logf(sums[1]);
  row.set_far();
  row.gap = (row.from_x != row.from_z ? 0 : (row.max_z - row.max_x) * row.inverse_t) + log_ratio(sums[0], sums[1]);
  const float scale = float(call.parameters.scale);
  row.factor = call.kd_factor * weight * scale * row.inverse_t;
  if (cross) {
    row.ce_weight = call.ce_factor * weight;
    row.ce_is_q = !raw;
    row.max_raw = row.max_x;
    row.log_raw = raw ? logf(sums[2]) : row.log_x;
    row.smooth = call.label_smoothing / float(call.classes);
    row.hot = 1 - call.label_smoothing;
  }

  const bool gradients = need_s || need_t, known = closed && gradients && !need_t;  // sum v is 0: one walk does all
  float found[3] = {0, 0, 0};  // loss, sum v, sum u
  if (!known) {
    walk<kind, true, true, false>(call, row, part, xs, zs, gs, gt, found);
    cluster_reduce(Sum(), found, scratch, 2);
    row.sum_v = closed ? 0 : found[1];
    row.sum_u = kind == Kind::reverse_kl ? 0 : found[2];  // u = p - q
  }
  if (gradients) {
    float again[3] = {0, 0, 0};
    walk<kind, true, closed, true>(call, row, part, xs, zs, gs, gt, again);
    if (known) {
      cluster_reduce(Sum(), again, scratch, 3);
      found[0] = again[0];
    }
  }
  if (!first) return;
  const float value = scale == 0 ? 0 : scale * found[0];
  if (call.per_row) {
    call.kd[index] = value;
    const float stats[kStats] = {row.max_x, row.log_x, row.max_z, row.log_z, row.gap, row.sum_v, row.sum_u};
    for (int i = 0; i < kStats; ++i) call.stats[i * call.rows.count + index] = stats[i];
    return;
  }
  call.kd[index] = weight * value;
  if (cross) {
    float ce = row.log_raw - (x_label - row.max_raw);
    if (call.label_smoothing != 0) ce = row.hot * ce + call.label_smoothing * (row.log_raw - sums[3] / float(call.classes));
    call.ce[index] = weight * ce;
  }
#endif
}

// One block per run of a row's classes: both logits in, gradients out, from the row's stats.
template <Kind kind, class T>
__global__ void __launch_bounds__(kThreads, 2) divergence_backward_kernel(const __grid_constant__ Divergence call, int per_block, int parts, bool wide) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // where the forward is
  const int64_t index = blockIdx.x / parts;
  const int which = int(blockIdx.x % parts);
  const int64_t s = row_start(call.rows, call.student, index), t = row_start(call.rows, call.teacher, index);
  const int64_t gs = row_start(call.rows, call.grad_student, index), gt = row_start(call.rows, call.grad_teacher, index);
  const int64_t me = which * kThreads + threadIdx.x, all = int64_t(parts) * kThreads;
  const float upstream = call.row_weight[index];
  const auto stat = [&](int i) { return call.stats[i * call.rows.count + index]; };
  RowState row;
  row.gap = stat(4);
  fill_rest(call, gs, gt, me, all);
  if (upstream == 0 || row.gap != row.gap) return fill_row(call, gs, gt, 0, me, all);
  if (row.gap == -Max::start) return fill_row(call, gs, gt, nanf(""), me, all);
  row.inverse_t = 1 / (call.row_temperature ? call.row_temperature[index] : call.temperature);
  row.max_x = stat(0), row.log_x = stat(1), row.max_z = stat(2), row.log_z = stat(3), row.sum_v = stat(5), row.sum_u = stat(6);
  row.set_far();
  row.factor = upstream * float(call.parameters.scale) * row.inverse_t;
  Part part{int64_t(which) * per_block, per_block, wide};
  if (part.first + part.count > call.classes) part.count = int(call.classes - part.first);
  const T* xs = static_cast<const T*>(call.student.data) + s + part.first;
  const T* zs = static_cast<const T*>(call.teacher.data) + t + part.first;
  float none[3];
  walk<kind, false, false, true>(call, row, part, xs, zs, gs, gt, none);
#endif
}

namespace {

template <Kind kind, class T>
void run_kind(const Divergence& call, const DivergencePlan& plan, bool backward, cudaStream_t stream) {
  if (backward) {
    constexpr int per_block = kThreads * kPack * 2;
    const int parts = int((call.classes + per_block - 1) / per_block);
    return launch("divergence_backward_kernel", divergence_backward_kernel<kind, T>, call.rows.count * parts, kThreads, 0, stream, 1, call,
                  per_block, parts, plan.wide);
  }
  const char* const name = "divergence_forward_kernel";
  const auto kernel = divergence_forward_kernel<kind, T>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared)), name);
  if (plan.cluster > 8) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name);
  launch(name, kernel, call.rows.count * plan.cluster, kThreads, plan.shared, stream, unsigned(plan.cluster), call, plan.per_block, plan.wide);
}

}  // namespace

template <class T>
void divergence_run(const Divergence& call, const DivergencePlan& plan, bool backward, cudaStream_t stream) {
  switch (call.kind) {
    case Kind::forward_kl: return run_kind<Kind::forward_kl, T>(call, plan, backward, stream);
    case Kind::reverse_kl: return run_kind<Kind::reverse_kl, T>(call, plan, backward, stream);
    case Kind::jeffreys: return run_kind<Kind::jeffreys, T>(call, plan, backward, stream);
    case Kind::js: return run_kind<Kind::js, T>(call, plan, backward, stream);
    case Kind::skew_forward_kl: return run_kind<Kind::skew_forward_kl, T>(call, plan, backward, stream);
    case Kind::skew_reverse_kl: return run_kind<Kind::skew_reverse_kl, T>(call, plan, backward, stream);
    case Kind::tvd: return run_kind<Kind::tvd, T>(call, plan, backward, stream);
    case Kind::alpha: return run_kind<Kind::alpha, T>(call, plan, backward, stream);
    case Kind::dkd:
    case Kind::binary: break;
  }
  throw std::invalid_argument("kind: the CUDA divergence has neither dkd nor binary");
}

// How many blocks of so much shared memory a cluster can have on the current device: 16 is beyond what each must offer.
template <class T>
int divergence_largest_cluster(int shared) {
  const auto kernel = divergence_forward_kernel<Kind::forward_kl, T>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  int largest = 0;
  for (int cluster = kMaxCluster; cluster >= 1 && largest == 0; cluster /= 2) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(cluster));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = std::size_t(shared);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int active = 0;
    if (cudaOccupancyMaxActiveClusters(&active, kernel, &config) == cudaSuccess && active > 0) largest = cluster;
  }
  cudaGetLastError();  // a size it refused
  return largest;
}

}  // namespace cuda
}  // namespace kdfast

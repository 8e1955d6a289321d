// Sinkhorn iterations and their exact reverse on a GPU: the calls bind_cuda_sinkhorn.cpp makes, those of the CPU kernels
// (cpu/sinkhorn.h) with device pointers. float32 inside, `status` unused. Each call is one launch, and nothing waits for it.
#pragma once

#include <cuda_runtime.h>

#include "cpu/sinkhorn.h"

namespace kdfast {
namespace cuda {

// Problems that fit the shared memory of a block of the current device (sinkhorn.cu) go many at a time; others (sinkhorn_grid.cu) one
// after the other over the whole GPU, out of L2, with a workspace of that many bytes.
std::size_t sinkhorn_workspace(int64_t n, int64_t m, bool backward);

void sinkhorn_forward(const SinkhornCall& call, cudaStream_t stream);
void sinkhorn_backward(const SinkhornCall& call, cudaStream_t stream);

void sinkhorn_grid_forward(const SinkhornCall& call, cudaStream_t stream);
void sinkhorn_grid_backward(const SinkhornCall& call, cudaStream_t stream);
std::size_t sinkhorn_grid_workspace(int64_t n, int64_t m, bool backward);

}  // namespace cuda
}  // namespace kdfast

// Routing on a GPU: scores with top-k, plans. The calls are those of the CPU kernels (cpu/routing.h) with device pointers;
// float32 inside, `status` unused. Everything is known from the shapes, nothing waits for the GPU.
#pragma once

#include <cuda_runtime.h>

#include "cpu/routing.h"

namespace kdfast {
namespace cuda {

constexpr int64_t kMostExperts = 512;  // a row is held by the registers of one warp, a plan's counters by shared memory

// partial_counts [score_blocks, E + 1] (the last: rows of the block), partial_probs [score_blocks, E].
struct Scores : ScoreCall {
  int32_t* counts = nullptr;            // [E]
  float* mean_probs = nullptr;          // [E]
  const int64_t* kept_rows = nullptr;   // backward with grad_mean: the number of rows that are not masked
};
int64_t score_blocks(int64_t rows);
void scores_forward(const Scores& call, cudaStream_t stream);
void scores_backward(const Scores& call, cudaStream_t stream);

// histogram [plan_blocks + 1, E]
int64_t plan_blocks(int64_t slots);
void plan(const PlanCall& call, cudaStream_t stream);

}  // namespace cuda
}  // namespace kdfast

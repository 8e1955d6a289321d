#include "cuda/divergence_kernels.cuh"

namespace kdfast {
namespace cuda {

template void divergence_run<float>(const Divergence&, const DivergencePlan&, bool, cudaStream_t);

}  // namespace cuda
}  // namespace kdfast

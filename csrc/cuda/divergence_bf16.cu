#include "cuda/divergence_kernels.cuh"

namespace kdfast {
namespace cuda {

template void divergence_run<__nv_bfloat16>(const Divergence&, const DivergencePlan&, bool, cudaStream_t);
template int divergence_largest_cluster<__nv_bfloat16>(int);

}  // namespace cuda
}  // namespace kdfast

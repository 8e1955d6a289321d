// The one thing kernels cannot write in plain CUDA: dynamic shared memory under a name that the emulator of
// python_tests/cuda/emulator understands too. Clusters and grids: cooperative_groups.h. Launches: launch.h, never <<<>>>.
#pragma once

#include <cuda_runtime.h>

#if defined(KDFAST_CUDA_EMULATED)
#define KD_DYNAMIC_SHARED(name) unsigned char* const name = ::emulator::dynamic_shared(*::emulator::current->block)
#else
#define KD_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

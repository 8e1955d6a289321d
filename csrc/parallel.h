// Parallel loops over blocks of fixed size. Results never depend on the number of threads: every block writes its own
// output, and sums over blocks are added in block order by the caller.
#pragma once

#include <cstdint>

namespace kdfast {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
// torch_parallel_for of libtorch_cpu: runs function over [begin, end) on torch's pool, returns non-zero on error.
using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context);

void set_parallel(TorchParallelFor function);  // null: own std::threads for large work
void set_serial();                             // in a forked child: no pool survives the fork
const char* pool_name();

// function(begin, end, context) over [0, n), in ranges of at least `grain`.
void parallel_ranges(int64_t n, int64_t grain, RangeFunction function, void* context);

// The same with a callable. A lambda's type belongs to the function that makes it, so instances in kernels of different
// instruction sets are different symbols.
template <class F>
static inline void parallel_for(int64_t n, int64_t grain, const F& body) {
  parallel_ranges(
      n, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace kdfast

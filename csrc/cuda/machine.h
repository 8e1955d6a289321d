// What a device offers the kernels of this build.
#pragma once

#include <string>

namespace kdfast {
namespace cuda {

struct Device {
  int capability = 0;      // 90 for 9.0
  int shared_bytes = 0;    // of one block, the most it may ask for
  int multiprocessors = 0;
  std::string reason;      // why nothing of this build runs there; empty: it does
};

Device device(int index);

}  // namespace cuda
}  // namespace kdfast

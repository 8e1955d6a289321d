#include "isa.h"

#include <cstring>
#include <initializer_list>

namespace kdfast {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::v4: return "x86-64-v4";
    case Isa::v3: return "x86-64-v3";
    default: return "baseline";
  }
}

bool isa_usable(Isa isa) {
  switch (isa) {
#if defined(KD_HAVE_v4)
    // By feature: the level names ("x86-64-v4") are unknown to compilers before GCC 12.
    case Isa::v4:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && isa_usable(Isa::v3);
    case Isa::v3:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
             __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt");
#endif
    case Isa::baseline: return true;
    default: return false;
  }
}

static Isa best() {
#if defined(KD_HAVE_v4)
  __builtin_cpu_init();
#endif
  return isa_usable(Isa::v4) ? Isa::v4 : isa_usable(Isa::v3) ? Isa::v3 : Isa::baseline;
}

static Isa chosen = best();

Isa current_isa() { return chosen; }

bool set_isa(const char* name) {
  for (Isa isa : {Isa::baseline, Isa::v3, Isa::v4}) {
    const char* full = isa_name(isa);
    const bool match = !std::strcmp(name, full) || (isa != Isa::baseline && !std::strcmp(name, full + 7));  // "v4" too
    if (match && isa_usable(isa)) {
      chosen = isa;
      return true;
    }
  }
  return false;
}

}  // namespace kdfast

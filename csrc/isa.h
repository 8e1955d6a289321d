// Which instruction set the kernels run with: one copy of each kernel per set, chosen once at run time.
#pragma once

namespace kdfast {

enum class Isa { baseline = 0, v3 = 1, v4 = 2 };  // x86-64 levels; baseline is NEON on aarch64

Isa current_isa();
const char* isa_name(Isa isa);
bool isa_usable(Isa isa);        // built in, and this machine has it
bool set_isa(const char* name);  // false if unknown or not usable

}  // namespace kdfast

// Declares a kernel in the namespace of every instruction set.
#define KD_PER_ISA(...) \
  namespace baseline {  \
  __VA_ARGS__;          \
  }                     \
  namespace v3 {        \
  __VA_ARGS__;          \
  }                     \
  namespace v4 {        \
  __VA_ARGS__;          \
  }

// Calls it in the one chosen.
#if defined(KD_HAVE_v4)
#define KD_CALL(function, ...)                                                              \
  (::kdfast::current_isa() == ::kdfast::Isa::v4   ? ::kdfast::v4::function(__VA_ARGS__)     \
   : ::kdfast::current_isa() == ::kdfast::Isa::v3 ? ::kdfast::v3::function(__VA_ARGS__)     \
                                                  : ::kdfast::baseline::function(__VA_ARGS__))
#else
#define KD_CALL(function, ...) ::kdfast::baseline::function(__VA_ARGS__)
#endif

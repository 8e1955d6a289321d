// The one formula that every compiled backend of kdfast.ops.sinkhorn rests on.
#pragma once

#include "inline.h"

namespace kdfast {

// cost * scale + (a + b), accurate where the large terms cancel: the rounding of a + b is added back. (Without a fused
// multiply-add the product's own rounding remains; it is the same in every pass.)
template <class S, class N>
KD_INLINE N exponent(N cost, S scale, N a, N b) {
  const N sum = a + b, part = sum - a, lost = (a - (sum - part)) + (b - part);
  return (cost * scale + sum) + lost;
}

}  // namespace kdfast

// The formulas of kdfast.ops.routing for one logit, once for every compiled backend.
//
// Ops O: number type N with arithmetic and comparisons, and set, select, min, max, abs, exp, log, log1p, sqrt.
#pragma once

#include "cpu/routing.h"
#include "inline.h"

namespace kdfast {

template <class O, class N = typename O::N>
KD_INLINE N softplus(N z) {
  return O::max(z, O::set(0)) + O::log1p(O::exp(-O::abs(z)));
}

template <class O, class N = typename O::N>
KD_INLINE N sigmoid(N z) {
  const N t = O::exp(-O::abs(z));
  return O::select(z < O::set(0), t, O::set(1)) / (t + O::set(1));
}

// log of the score, from z and the row's log-sum-exp.
template <class O, class N = typename O::N>
KD_INLINE N log_score(Score score, N z, N lse) {
  if (score == Score::sigmoid) return O::min(z, O::set(0)) - O::log1p(O::exp(-O::abs(z)));
  if (score == Score::sqrt_softplus) {
    // log log(1 + e^z) is z to the last bit below -37, where log1p would underflow
    const auto low = z < O::set(-37);
    return O::set(0.5) * O::select(low, z, O::log(O::select(low, O::set(1), softplus<O>(z))));
  }
  return score == Score::softmax ? z - lse : z;
}

// What the choice goes by before the bias: the score itself (softmax: p).
template <class O, class N = typename O::N>
KD_INLINE N selection_score(Score score, N z, N p) {
  if (score == Score::softmax) return p;
  if (score == Score::sigmoid) return sigmoid<O>(z);
  return score == Score::sqrt_softplus ? O::sqrt(softplus<O>(z)) : z;
}

// d log s / dz of the scores that are no softmax.
template <class O, class N = typename O::N>
KD_INLINE N log_score_slope(Score score, N z) {
  if (score == Score::sigmoid) return sigmoid<O>(-z);
  if (score == Score::sqrt_softplus) {  // sigmoid(z) / (2 softplus(z)): 1/2 far below zero
    const auto low = z < O::set(-37);
    return O::select(low, O::set(0.5), O::set(0.5) * sigmoid<O>(z) / O::select(low, O::set(1), softplus<O>(z)));
  }
  return O::set(1);
}

}  // namespace kdfast

// The formulas of kdfast.ops.divergence, once for every compiled backend (CPU vectors, CUDA scalars).
//
// For one class: lq, lp = log q, log p and d = lp - lq, which is NaN where both are -inf: every use of d is guarded by a
// comparison that is false for NaN or by a probability that is 0. Every kind is an f-divergence
// sum q f(p/q), given by
//     term >= 0    its share of the loss, written so that nothing cancels when p and q are close
//     v            q dL/dq up to a multiple of q:   dL/dx_i = v_i - q_i sum v
//     u            p dL/dp up to a multiple of p:   dL/dz_i = u_i - p_i sum u
// The multiple is chosen so that the gradient does not cancel either: forward KL has v = q - p, whose sum is 0.
// f is taken with f(1) = f'(1) = 0 (adding c (p - q) changes no sum, since p and q both sum to 1), so each term is
// non-negative and of second order in d: a KL of 5e-7 keeps its digits where sum p d has lost all of them.
#pragma once

#include <cstdint>

#include "inline.h"

namespace kdfast {

enum class Kind : int {
  forward_kl, reverse_kl, jeffreys, js, skew_forward_kl, skew_reverse_kl, tvd, alpha, dkd, binary
};

// What the terms need beside the logs; made once per call by named_kind (divergence_kinds.h).
struct KindParameters {
  double beta = 0;          // mixture weight, or the order of alpha
  double small = 0;         // |d| below this: the term is its power series
  double scale = 1;         // of the whole divergence (js_rescaled)
  double series[16] = {};   // coefficients of d^2, d^3, ... of term / q (js, alpha)
};

// Closed: sum v is 0, so loss and student gradient go in one pass.
constexpr bool is_closed(Kind kind) { return kind == Kind::forward_kl || kind == Kind::dkd || kind == Kind::binary; }

template <class N>
struct Element {
  N q, p, term, v, u;
};

// p d + q - p and q - p, where d = log(p / q), to full relative precision also for small d, where the plain forms cancel:
// with phi(d) = d + expm1(-d) the first is p phi(d), the second p phi(d) - p d.
// Ops O: number type N with arithmetic, constants, select, min, max, abs, exp (of a log-probability), exp_any, log1p,
// expm1_small (|x| <= 1/2), phi_series (sum x^k / (k + 2)!, |x| <= 1/4) and polynomial.
template <class N>
struct Kl {
  N term, difference;
};
template <class O, class N = typename O::N>
KD_INLINE Kl<N> kl(N p, N q, N d) {
  const auto small = O::abs(d) < O::set(0.25);
  // p = 0 contributes q (the limit), also for d = -inf
  const N pd = O::select(p > O::set(0), p * d, O::set(0));
  const N near = p * (d * d) * O::phi_series(-d), far = q - p;
  return {O::select(small, near, pd + far), O::select(small, near - pd, far)};
}

// With `known`, e.q and e.p come in (a driver that kept the exponentials); else they are made from lq and lp.
template <class O, Kind kind, bool known = false, class N = typename O::N>
KD_INLINE Element<N> divergence_element(N lq, N lp, N d, const KindParameters& k, Element<N> e = Element<N>()) {
  if constexpr (kind == Kind::binary) {
    // Two coins per class; lq, lp are the logits x, z themselves and d = z - x.
    const N one = O::set(1);
    const N eq = O::exp(-O::abs(lq)), ep = O::exp(-O::abs(lp));
    const N tq = O::log1p(eq), tp = O::log1p(ep);
    const N q1 = O::select(lq > O::set(0), one / (one + eq), eq / (one + eq)), p1 = O::select(lp > O::set(0), one / (one + ep), ep / (one + ep));
    const N q0 = O::select(lq > O::set(0), eq / (one + eq), one / (one + eq)), p0 = O::select(lp > O::set(0), ep / (one + ep), one / (one + ep));
    // log of the ratios of both sides; a side where both are certain of 0 counts nothing
    const N d1 = O::select(O::equal(lp, lq), O::set(0), (O::min(lp, O::set(0)) - tp) - (O::min(lq, O::set(0)) - tq));
    const N d0 = O::select(O::equal(lp, lq), O::set(0), (O::min(-lp, O::set(0)) - tp) - (O::min(-lq, O::set(0)) - tq));
    e.q = q1, e.p = p1;
    e.term = kl<O>(p1, q1, d1).term + kl<O>(p0, q0, d0).term;
    e.v = q1 - p1;  // no softmax behind it: the drivers take both sums as 0
    e.u = O::select(p1 * p0 > O::set(0), p1 * p0 * d, O::set(0));
    return e;
  } else if constexpr (kind == Kind::js || kind == Kind::skew_forward_kl || kind == Kind::skew_reverse_kl) {
    // m = b (first) + (1-b) (second); first is the teacher, for skew_reverse_kl the student. log m = larger log + L.
    constexpr bool swap = kind == Kind::skew_reverse_kl;
    const N b = O::set(k.beta), c = O::set(1 - k.beta);
    // beyond 1e4 one side is 0 anyway; 0 * 1e4 = 0 where 0 * inf would be NaN
    // (min and max give their first argument when the second is NaN)
    const N gap = O::max(O::set(-1e4), O::min(O::set(1e4), swap ? -d : d));  // log first - log second
    const N small_ratio = O::exp(-O::abs(gap));
    const N minus = O::select(O::abs(gap) < O::set(0.5), O::expm1_small(-O::abs(gap)), small_ratio - O::set(1));
    const N L = O::log1p(O::select(gap > O::set(0), c, b) * minus);
    if constexpr (!known) {
      const N big = O::exp(O::max(lq, lp)), other = big * small_ratio;  // one exponential for both
      const auto teacher_first = swap ? gap < O::set(0) : gap > O::set(0);
      e.p = O::select(teacher_first, big, other);
      e.q = O::select(teacher_first, other, big);
    }
    const N first = swap ? e.q : e.p, second = swap ? e.p : e.q;
    const N log_first = O::min(gap, O::set(0)) - L;      // log(first / m)
    const N log_second = -O::max(gap, O::set(0)) - L;    // log(second / m)
    if constexpr (kind == Kind::js) {
      const N far = b * first * log_first + c * second * log_second;
      const N near = second * (gap * gap) * O::polynomial(gap, k.series);
      e.term = O::select(O::abs(gap) < O::set(k.small), near, O::max(far, O::set(0)));
      e.v = c * second * log_second;
      e.u = b * first * log_first;
    } else {
      const N mixture = b * first + c * second;
      const Kl<N> to_mixture = kl<O>(first, mixture, log_first);
      e.term = to_mixture.term;
      // first/m is near 1: its difference from 1 is taken, which moves v and u by a multiple of q and p
      const N off = O::select(mixture > O::set(0), to_mixture.difference / mixture, O::set(0));  // 1 - first/m
      const N of_first = first * (log_first + b * off), of_second = c * second * off;
      e.v = swap ? of_first : of_second;
      e.u = swap ? of_second : of_first;
    }
    return e;
  } else {
    if constexpr (!known) e.q = O::exp(lq), e.p = O::exp(lp);
    const N q = e.q, p = e.p;
    if constexpr (kind == Kind::forward_kl || kind == Kind::dkd) {
      const Kl<N> forward = kl<O>(p, q, d);
      e.term = forward.term;
      e.v = forward.difference;
      e.u = O::select(p > O::set(0), p * d, O::set(0));
    } else if constexpr (kind == Kind::reverse_kl) {
      const Kl<N> reverse = kl<O>(q, p, -d);
      e.term = reverse.term;
      e.v = O::select(q > O::set(0), -q * d, O::set(0));
      e.u = reverse.difference;
    } else if constexpr (kind == Kind::jeffreys) {
      const N forward = O::set(2 * (1 - k.beta)), reverse = O::set(2 * k.beta);
      const Kl<N> f = kl<O>(p, q, d), r = kl<O>(q, p, -d);
      e.term = forward * f.term + reverse * r.term;
      e.v = forward * f.difference + reverse * O::select(q > O::set(0), -q * d, O::set(0));
      e.u = forward * O::select(p > O::set(0), p * d, O::set(0)) + reverse * r.difference;
    } else if constexpr (kind == Kind::tvd) {
      const N difference = O::select(O::abs(d) < O::set(0.5), q * O::expm1_small(d), p - q);
      const N sign = O::select(d > O::set(0), O::set(-0.5), O::select(d < O::set(0), O::set(0.5), O::set(0)));  // of q - p, halved
      e.term = O::set(0.5) * O::abs(difference);
      e.v = q * sign;
      e.u = -p * sign;
    } else {  // alpha
      static_assert(kind == Kind::alpha, "a kind without a formula");
      const N a = O::set(k.beta), b = O::set(k.beta - 1), ad = a * d, bd = b * d;
      N power = a * lp - b * lq;
      power = O::select(O::equal(power, power), power, O::set(-1e4));  // both -inf: p^a q^(1-a) = 0
      const N r = O::exp_any(power);
      e.v = O::select(O::abs(ad) < O::set(0.5), -q * O::expm1_small(ad), q - r) / a;
      e.u = O::select(O::abs(bd) < O::set(0.5), p * O::expm1_small(bd), r - p) / b;
      // (r - a p - (1-a) q) / (a (a-1)) from whichever of u and v does not divide by a number near 0
      const N far = k.beta > 0.5 ? (e.u + (q - p)) / a : (e.v + (p - q)) / -b;
      const N near = q * (d * d) * O::polynomial(d, k.series);
      e.term = O::select(O::abs(d) < O::set(k.small), near, O::max(far, O::set(0)));
    }
    return e;
  }
}

}  // namespace kdfast

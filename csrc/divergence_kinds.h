// From a kind's name to what the kernels take: the same for every compiled backend.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "divergence_terms.h"

namespace kdfast {

struct NamedKind {
  Kind kind = Kind::forward_kl;
  KindParameters parameters;
  double dkd[2] = {1, 1};  // target and non-target weight
  bool zero = false;       // skew with beta = 1: identically 0
};

// Taylor coefficients of d^2, d^3, ... of one kind's term / q (divergence_terms.h), in double.
inline void js_series(double b, double* out) {
  // term / q = b d e^d - m K,  m = 1 - b + b e^d,  K = log m;  K' = b e^d / m gives K's series by division
  constexpr int n = 19;
  double e[n], m[n], slope[n], K[n] = {};
  double factorial = 1;
  for (int i = 0; i < n; ++i) {
    if (i) factorial *= i;
    e[i] = 1 / factorial;
    m[i] = b * e[i] + (i == 0 ? 1 - b : 0);
  }
  for (int i = 0; i < n; ++i) {
    slope[i] = b * e[i];
    for (int j = 0; j < i; ++j) slope[i] -= slope[j] * m[i - j];
  }
  for (int i = 1; i < n; ++i) K[i] = slope[i - 1] / i;
  for (int i = 2; i < n - 1; ++i) {
    double value = b * e[i - 1];
    for (int j = 0; j <= i; ++j) value -= m[j] * K[i - j];
    out[i - 2] = value;
    if (i - 2 == 15) break;
  }
}

inline void alpha_series(double a, double* out) {
  // (e^{a d} - a e^d - (1 - a)) / (a (a - 1)): coefficient of d^n is (1 + a + ... + a^{n-2}) / n!
  double factorial = 1, sum = 0, power = 1;
  for (int n = 2; n < 18; ++n) {
    factorial *= n;
    sum += power;
    power *= a;
    out[n - 2] = sum / factorial;
  }
}

inline NamedKind named_kind(const std::string& kind, double a, double b) {
  NamedKind named;
  KindParameters& k = named.parameters;
  k.beta = a;
  if (kind == "forward_kl") {
    named.kind = Kind::forward_kl;
  } else if (kind == "reverse_kl") {
    named.kind = Kind::reverse_kl;
  } else if (kind == "jeffreys") {
    named.kind = Kind::jeffreys;
  } else if (kind == "js" || kind == "js_rescaled") {
    if (a == 0 || a == 1) {
      named.kind = a == 0 ? Kind::forward_kl : Kind::reverse_kl;
      return named;
    }
    named.kind = Kind::js;
    k.small = 0.25;
    js_series(a, k.series);
    if (kind == "js_rescaled") k.scale = 1 / (a * (1 - a));
  } else if (kind == "skew_forward_kl" || kind == "skew_reverse_kl") {
    const bool forward = kind == "skew_forward_kl";
    named.zero = a == 1;  // the mixture is the first distribution itself
    named.kind = a == 0 || a == 1 ? (forward ? Kind::forward_kl : Kind::reverse_kl) : (forward ? Kind::skew_forward_kl : Kind::skew_reverse_kl);
  } else if (kind == "tvd") {
    named.kind = Kind::tvd;
  } else if (kind == "alpha") {
    if (a == 0 || a == 1) {
      named.kind = a == 1 ? Kind::forward_kl : Kind::reverse_kl;
      return named;
    }
    named.kind = Kind::alpha;
    k.small = 0.25 / std::max(1.0, std::abs(a));
    alpha_series(a, k.series);
  } else if (kind == "dkd") {
    named.kind = Kind::dkd;
    named.dkd[0] = a;
    named.dkd[1] = b;
  } else if (kind == "binary") {
    named.kind = Kind::binary;
  } else {
    throw std::invalid_argument("kind: unknown to the compiled core: " + kind);
  }
  return named;
}

}  // namespace kdfast

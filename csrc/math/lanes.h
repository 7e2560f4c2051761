// Arithmetic on one float64 or on several side by side in a vector register.
//
// A formula over `Real` and `Mask` (double and bool, or two vectors) chooses with `select` and joins conditions by & and
// |, never && and ||, so that it has no branch that differs between lanes; each lane gets the bits that a double gets.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>
#include <cstdint>
#include <limits>

// Inlined by force: a vector must not be the argument of a call between functions for different instruction sets.
#if defined(__GNUC__)
#define TOLARIA_LANEWISE C10_HOST_DEVICE inline __attribute__((always_inline))
#pragma GCC diagnostic ignored "-Wpsabi"  // which warns of just that call
#else
#define TOLARIA_LANEWISE C10_HOST_DEVICE inline
#endif

namespace tolaria::math {

#if defined(__GNUC__) && !defined(__CUDACC__)
#define TOLARIA_HAS_LANES 1
// A vector register of float64; the unaligned form is for memory.
template <int kBytes>
struct Lanes {
  static constexpr int kCount = kBytes / sizeof(double);
  typedef double Real __attribute__((vector_size(kBytes)));
  typedef double Unaligned __attribute__((vector_size(kBytes), aligned(8), may_alias));
};
#endif

// The same value in every lane.
template <class Real>
TOLARIA_LANEWISE Real spread(double value) {
  return value - Real{};
}

template <class Mask, class Real>
TOLARIA_LANEWISE Real select(const Mask& condition, const Real& yes, const Real& no) {
  return condition ? yes : no;
}

TOLARIA_LANEWISE bool any(bool condition) { return condition; }
TOLARIA_LANEWISE double root(double x) { return std::sqrt(x); }

#ifdef TOLARIA_HAS_LANES
template <class Mask>
TOLARIA_LANEWISE bool any(const Mask& condition) {
  auto found = condition[0];
  for (unsigned l = 1; l < sizeof(Mask) / sizeof(found); ++l) found |= condition[l];
  return found != 0;
}

template <class Real>
TOLARIA_LANEWISE Real root(const Real& x) {
  Real y;
  for (unsigned l = 0; l < sizeof(Real) / sizeof(double); ++l) y[l] = std::sqrt(x[l]);
  return y;
}
#endif

template <class Real>
TOLARIA_LANEWISE auto is_bounded(const Real& x) {
  const double infinity = std::numeric_limits<double>::infinity();
  return (x > -infinity) & (x < infinity);
}

// One NaN for all: its sign and payload depend on the machine and on the order of operands.
template <class Real>
TOLARIA_LANEWISE Real one_nan(const Real& x) {
  return select(x == x, x, spread<Real>(std::numeric_limits<double>::quiet_NaN()));
}

}  // namespace tolaria::math

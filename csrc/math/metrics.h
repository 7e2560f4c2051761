// classification_metrics_: cross entropy by an online softmax, and the label's rank among the logits.
//
// The one family in which contraction into FMA is allowed: its sums are bounded, not equal, across devices.
#pragma once

#include <c10/macros/Macros.h>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace tolaria::math {

// Places in the accumulator; correct[C] and count[C] of the classes follow, unless it is too short for them.
enum MetricsField : int { kLossSum, kCount, kCorrect, kTopkCorrect, kInvalid, kMetricsFields };

// exp(x) for x <= 0: 2^n times 2^f, n the integer nearest to x log2(e) and 2^f a minimax polynomial of degree 5 (9.2e-8
// relative). log2(e) is rounded, so that with FMA the whole is within 2e-7 + 2e-8 |x| of exp(x), relative: in a sum whose
// largest term is 1, far terms weigh little. Without FMA (CUDA, processors before AVX2) the product is rounded, too: half a
// unit of float32, 6e-8 |x| more. 0 from about -87.7 down, where n = -127 leaves the normal numbers; NaN stays
// NaN. No branch and no call, so that a loop of it becomes vector code.
C10_HOST_DEVICE inline float exp_nonpositive(float x) {
  constexpr float kLog2e = 1.44269504f;
  constexpr float kRound = 12583039.0f;  // 1.5 * 2^23 + 127: adding it leaves the exponent field of 2^n in the low bits
  const float clamped = x < -88.0f ? -88.0f : x;
  const float shifted = clamped * kLog2e + kRound;
  const float f = clamped * kLog2e - (shifted - kRound);
  float p = 1.326472731e-3f;
  p = p * f + 9.671512991e-3f;
  p = p * f + 5.550733581e-2f;
  p = p * f + 2.402224243e-1f;
  p = p * f + 6.931470037e-1f;
  p = p * f + 1.0f;
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof(bits));
  bits <<= 23;
  float scale;
  memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

C10_HOST_DEVICE inline double exp_nonpositive(double x) { return ::exp(x); }

// Whether a logit stands before the label's when they are sorted as argmax would: larger first, NaN largest of all, the
// smaller index first among equals. `is_earlier`: the logit's index is the smaller one.
template <typename acc_t>
C10_HOST_DEVICE inline bool outranks(acc_t logit, acc_t target, bool is_earlier) {
  if (target != target) return is_earlier && logit != logit;
  return is_earlier ? !(logit < target) : !(logit <= target);
}

// Sum of exp(x - max) over the logits seen so far.
template <typename acc_t>
struct SoftmaxSum {
  acc_t max = -INFINITY;
  double sum = 0;

  // What exponents are taken relative to; not the maximum while that is -inf, since -inf - -inf is NaN.
  C10_HOST_DEVICE acc_t origin() const { return max == -INFINITY ? acc_t(0) : max; }

  // Makes room for logits up to `peak`.
  C10_HOST_DEVICE void raise(acc_t peak) {
    if (!(peak > max)) return;
    if (sum != 0) sum *= static_cast<double>(exp_nonpositive(max - peak));
    max = peak;
  }

  C10_HOST_DEVICE void merge(const SoftmaxSum& other) {
    SoftmaxSum small = other;
    raise(other.max);
    small.raise(max);
    sum += small.sum;
  }

  // -log softmax of the label.
  C10_HOST_DEVICE double loss(acc_t target) const {
    return ::log(sum) + (static_cast<double>(origin()) - static_cast<double>(target));
  }
};

}  // namespace tolaria::math

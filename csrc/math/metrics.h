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

// exp(x) for x <= 0 within 2 ulp: 2^n times a polynomial of the rest. 0 from about -87.7 down, where n = -127 leaves the
// normal numbers; NaN stays NaN. No branch and no call, so that a loop of it becomes vector code.
C10_HOST_DEVICE inline float exp_nonpositive(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float clamped = x < -88.0f ? -88.0f : x;
  const float shifted = clamped * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits - 0x4B400000u + 127u) << 23;
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

// What a loss is compared with: thresholds of an explosion, band of chance level, gradient and drift test.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>
#include <limits>

#include "math/governor_state.h"
#include "math/stats.h"

namespace tolaria::math {

// One NaN for all: its sign and payload depend on the machine and on the order of operands.
C10_HOST_DEVICE inline double one_nan(double x) { return x == x ? x : std::numeric_limits<double>::quiet_NaN(); }

struct Moments {
  double mean;
  double m2;
};

// One Welford update; `count` is the number of samples including x. (Welford 1962; Knuth, TAOCP 2, 4.2.2.)
C10_HOST_DEVICE inline Moments welford(Moments m, double x, double count) {
  const double delta = x - m.mean;
  m.mean += delta / count;
  m.m2 += delta * (x - m.mean);
  return m;
}

// Moments of a window of the live memory, oldest to newest; `first` is where it begins.
C10_HOST_DEVICE inline Moments window_moments(const Governor& g, int size_field, int first) {
  Moments m{0.0, 0.0};
  const int size = static_cast<int>(g.live(size_field));
  for (int i = 0; i < size; ++i) m = welford(m, g.live(first + i), i + 1.0);
  return m;
}

C10_HOST_DEVICE inline Moments loss_moments(const Governor& g) {
  return window_moments(g, memory::history_size, g.losses());
}

struct Thresholds {
  double absolute, statistical, multiplier;
};

// A standard deviation that is not below its floor, a share of |mean|.
C10_HOST_DEVICE inline double floored(const double* c, double std, double mean) {
  const double floor = c[config::min_std] * (mean < 0.0 ? -mean : mean);
  return std < floor ? floor : std;
}

C10_HOST_DEVICE inline Thresholds thresholds(const double* c, double mean, double std) {
  const double infinity = std::numeric_limits<double>::infinity();
  Thresholds t;
  t.absolute = c[config::absolute_threshold];
  t.statistical = mean + c[config::sensitivity] * floored(c, std, mean);
  // The multiplier says nothing about a mean that is not positive: it always agrees in "all", never trips in "any".
  t.multiplier = mean > 0.0 ? c[config::multiplier] * mean : (c[config::rule_any] != 0.0 ? infinity : -infinity);
  return t;
}

C10_HOST_DEVICE inline bool is_explosion(const double* c, const Thresholds& t, double x) {
  const bool absolute = x > t.absolute, statistical = x > t.statistical, multiplier = x > t.multiplier;
  return c[config::rule_any] != 0.0 ? (absolute || statistical || multiplier) : (absolute && statistical && multiplier);
}

// The norm of a step's gradient, where it is judged.
struct Gradient {
  bool is_known;
  double norm;
};

// A gradient explodes where both its thresholds are passed, by its own window; infinite until that is long enough.
C10_HOST_DEVICE inline double gradient_threshold(const Governor& g, const double* c) {
  const double size = g.live(memory::gradient_size);
  if (size < c[config::min_history]) return std::numeric_limits<double>::infinity();
  const Moments m = window_moments(g, memory::gradient_size, g.gradients());
  const double statistical = m.mean + c[config::sensitivity] * floored(c, std::sqrt(m.m2 / size), m.mean);
  const double multiplier = c[config::gradient_multiplier] * m.mean;
  return statistical > multiplier ? statistical : multiplier;
}

// The drift sum with x counted in: a one-sided CUSUM (Page 1954) of losses standardised by a baseline that forgets.
C10_HOST_DEVICE inline double drift_with(const Governor& g, const double* c, double x) {
  const double sum = g.live(memory::drift_sum), mean = g.live(memory::drift_mean);
  if (c[config::drift_horizon] == 0.0 || g.live(memory::drift_count) < c[config::min_history]) return sum;
  double z = (x - mean) / floored(c, std::sqrt(g.live(memory::drift_variance)), mean);
  z = z > kDriftClip ? kDriftClip : z < -kDriftClip ? -kDriftClip : z == z ? z : 0.0;
  const double next = sum + z - c[config::drift_slack];
  return next > 0.0 ? next : 0.0;
}

// Baseline of the drift test: plain moments of the first `drift_horizon` losses, from then on exponentially forgetting.
C10_HOST_DEVICE inline void move_baseline(const Governor& g, const double* c, double x) {
  double count = g.live(memory::drift_count) + 1.0;
  count = count < c[config::drift_horizon] ? count : c[config::drift_horizon];
  const double delta = x - g.live(memory::drift_mean);
  double mean = g.live(memory::drift_mean) + delta / count;
  double variance = g.live(memory::drift_variance);
  variance += (delta * (x - mean) - variance) / count;
  if (!is_finite(mean) || !is_finite(variance)) {  // overflow: begin anew
    count = 1.0;
    mean = x;
    variance = 0.0;
  }
  g.live(memory::drift_count) = count;
  g.live(memory::drift_mean) = mean;
  g.live(memory::drift_variance) = variance;
}

C10_HOST_DEVICE inline bool is_chance_level(const Governor& g, const double* c, double x) {
  const double guess = c[config::random_guess_loss];  // NaN where there is none: every comparison below is then false
  return g.live(memory::history_size) >= c[config::min_history] &&
         g.live(memory::last_healthy) < c[config::lobotomy_healthy_below] * guess &&
         x >= c[config::lobotomy_low] * guess && x <= c[config::lobotomy_high] * guess;
}

}  // namespace tolaria::math

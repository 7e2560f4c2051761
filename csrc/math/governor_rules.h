// What a loss is compared with, and what is found: thresholds of an explosion, band of chance level, gradient, drift.
//
// A `Column` is one governor, or several side by side in vector lanes (math/lanes.h).
#pragma once

#include <c10/macros/Macros.h>

#include <limits>

#include "math/governor_state.h"
#include "math/lanes.h"

namespace tolaria::math {

template <class Real>
struct Moments {
  Real mean;
  Real m2;
};

// One Welford update; `count` is the number of samples including x. (Welford 1962; Knuth, TAOCP 2, 4.2.2.)
template <class Real>
TOLARIA_LANEWISE Moments<Real> welford(const Moments<Real>& m, const Real& x, const Real& count) {
  const Real delta = x - m.mean;
  const Real mean = m.mean + delta / count;
  return {mean, m.m2 + delta * (x - mean)};
}

// Moments of a window of the live memory, oldest to newest; `first` is where it begins.
C10_HOST_DEVICE inline Moments<double> window_moments(const Governor& g, int size_field, int first) {
  Moments<double> m{0.0, 0.0};
  const int size = entries_in(g.live(size_field), g.window);
  for (int i = 0; i < size; ++i) m = welford(m, g.live(first + i), i + 1.0);
  return m;
}

C10_HOST_DEVICE inline Moments<double> loss_moments(const Governor& g) {
  return window_moments(g, memory::history_size, g.losses());
}

template <class Real>
struct Thresholds {
  Real absolute, statistical, multiplier;
};

// A standard deviation that is not below its floor, a share of |mean|.
template <class Real>
TOLARIA_LANEWISE Real floored(const double* c, const Real& std, const Real& mean) {
  const Real floor = c[config::min_std] * select(mean < 0.0, -mean, mean);
  return select(std < floor, floor, std);
}

template <class Real>
TOLARIA_LANEWISE Thresholds<Real> thresholds(const double* c, const Real& mean, const Real& std) {
  const double infinity = std::numeric_limits<double>::infinity();
  Thresholds<Real> t;
  t.absolute = spread<Real>(c[config::absolute_threshold]);
  t.statistical = mean + c[config::sensitivity] * floored(c, std, mean);
  // The multiplier says nothing about a mean that is not positive: it always agrees in "all", never trips in "any".
  const Real silent = spread<Real>(c[config::rule_any] != 0.0 ? infinity : -infinity);
  t.multiplier = select(mean > 0.0, c[config::multiplier] * mean, silent);
  return t;
}

template <class Real>
TOLARIA_LANEWISE auto is_explosion(const double* c, const Thresholds<Real>& t, const Real& x) {
  const auto absolute = x > t.absolute, statistical = x > t.statistical, multiplier = x > t.multiplier;
  return c[config::rule_any] != 0.0 ? absolute | statistical | multiplier : absolute & statistical & multiplier;
}

// A gradient explodes where both its thresholds are passed, by its own window; infinite until that is long enough.
template <class Column, class Real>
TOLARIA_LANEWISE Real gradient_threshold(const Column& g, const double* c, const Moments<Real>& m) {
  const Real size = g.live(memory::gradient_size);
  const Real statistical = m.mean + c[config::sensitivity] * floored(c, root(m.m2 / size), m.mean);
  const Real multiplier = c[config::gradient_multiplier] * m.mean;
  const Real larger = select(statistical > multiplier, statistical, multiplier);
  return select(size < c[config::min_history], spread<Real>(std::numeric_limits<double>::infinity()), larger);
}

// The drift sum with x counted in: a one-sided CUSUM (Page 1954) of losses standardised by a baseline that forgets.
template <class Column, class Real>
TOLARIA_LANEWISE Real drift_with(const Column& g, const double* c, const Real& x) {
  const Real sum = g.live(memory::drift_sum);
  if (c[config::drift_horizon] == 0.0) return one_nan(sum);
  const Real count = g.live(memory::drift_count), mean = g.live(memory::drift_mean);
  const Real variance = g.live(memory::drift_variance), zero = spread<Real>(0.0);
  Real z = (x - mean) / floored(c, root(variance), mean);
  z = select(z == z, z, zero);
  z = select(z > kDriftClip, spread<Real>(kDriftClip), select(z < -kDriftClip, spread<Real>(-kDriftClip), z));
  const Real next = sum + z - c[config::drift_slack];
  return one_nan(select(count < c[config::min_history], sum, select(next > 0.0, next, zero)));
}

// Baseline of the drift test: plain moments of the first `drift_horizon` losses, from then on exponentially forgetting.
template <class Column, class Real>
TOLARIA_LANEWISE void move_baseline(const Column& g, const double* c, const Real& x) {
  const Real old_mean = g.live(memory::drift_mean), old_variance = g.live(memory::drift_variance);
  Real count = g.live(memory::drift_count);
  count += 1.0;
  count = select(count < c[config::drift_horizon], count, spread<Real>(c[config::drift_horizon]));
  const Real delta = x - old_mean;
  const Real mean = old_mean + delta / count;
  const Real variance = old_variance + (delta * (x - mean) - old_variance) / count;
  const auto fits = is_bounded(mean) & is_bounded(variance);  // else begin anew
  g.live(memory::drift_count) = select(fits, count, spread<Real>(1.0));
  g.live(memory::drift_mean) = select(fits, mean, x);
  g.live(memory::drift_variance) = select(fits, variance, spread<Real>(0.0));
}

// Whether a network that had learnt is back at the loss of guessing.
template <class Column>
struct ChanceLevel {
  typename Column::Mask learnt;   // for good, once the window's mean was low enough
  typename Column::Mask at_once;  // a loss of guessing right after one of a network that has learnt
  typename Column::Real level;    // of the losses since it has learnt; it forgets slowly
  typename Column::Real evidence;  // that the losses are those of guessing or worse: a CUSUM that one loss moves by 1 at most
};

template <class Column, class Real>
TOLARIA_LANEWISE ChanceLevel<Column> chance_level(const Column& g, const double* c, const Real& x, const Moments<Real>& m,
                                                  const Real& std) {
  using Mask = typename Column::Mask;
  const double guess = c[config::random_guess_loss];  // NaN where there is none: every comparison below is then false
  const double low = c[config::lobotomy_low] * guess, high = c[config::lobotomy_high] * guess;
  const double below = c[config::lobotomy_healthy_below] * guess;
  const Real size = g.live(memory::history_size), last = g.live(memory::last_healthy), former = g.live(memory::learnt);
  const Real level = g.live(memory::learnt_level), evidence = g.live(memory::collapse);
  const Real one = spread<Real>(1.0), zero = spread<Real>(0.0), bound = m.mean + c[config::sensitivity] * std;
  const Mask is_long = size >= c[config::min_history], is_classic = spread<Real>(c[config::lobotomy_classic]) != 0.0;
  const Mask in_band = (x >= low) & (x <= high), had_learnt = former != 0.0;
  ChanceLevel<Column> l;
  l.learnt = had_learnt | (is_long & (m.mean < below));
  // Where guessing lies within the window's own spread, a hard batch looks like a collapse.
  l.at_once = is_long & (last < below) & in_band & (is_classic | (l.learnt & (bound < low)));
  l.level = select(had_learnt, level, m.mean);
  const Real less = select(x < 0.5 * (l.level + low), -one, zero);
  const Real sum = evidence + select(in_band, one, select(x > high, spread<Real>(kWorseThanChance), less));
  const Real most = spread<Real>(2.0 * c[config::collapse_patience]);  // so that it comes down again
  const Real next = select(sum > most, most, select(sum > 0.0, sum, zero));
  l.evidence = one_nan(select(l.learnt & !is_classic, next, evidence));
  return l;
}

// Remembers what was found; a loss that has joined moves the level, one above the loss of guessing no more than that.
template <class Column, class Real>
TOLARIA_LANEWISE void remember_chance(const Column& g, const double* c, const ChanceLevel<Column>& l, const Real& x,
                               const typename Column::Mask& joins) {
  const Real low = spread<Real>(c[config::lobotomy_low] * c[config::random_guess_loss]);
  const Real moved = l.level + (select(x < low, x, low) - l.level) / kLevelHorizon;
  g.live(memory::learnt) = select(l.learnt, spread<Real>(1.0), spread<Real>(0.0));
  g.live(memory::learnt_level) = one_nan(select(l.learnt, select(joins, moved, l.level), spread<Real>(0.0)));
  g.live(memory::collapse) = l.evidence;
}

// Whether the level of the losses has shifted up for good: a one-sided CUSUM (Page 1954) of losses, each of bounded
// weight, in mean absolute deviations from a level that forgets. A spread below a share of a positive level, or of what
// the losses have come down since the start, counts as that share: late in a run a jump that costs nothing is no shift.
// Losses that depend on those before wander for a while without having shifted: how far a faster level is used to lie
// above the slower one counts, too. A loss above its level of which the gradient says little counts for more: such a state
// does not learn its way back.
template <class Column>
struct Shift {
  typename Column::Mask is_ready;  // the level is known
  typename Column::Mask found;
  typename Column::Mask has_norm;
  typename Column::Real scale, sum, armed, norm;
};

template <class Column, class Real>
TOLARIA_LANEWISE Shift<Column> shift_with(const Column& g, const double* c, const Real& x,
                                          const Real& norm, const typename Column::Mask& has_norm) {
  using Mask = typename Column::Mask;
  const double horizon = c[config::shift_horizon], threshold = c[config::shift_threshold];
  const Real level = g.live(memory::shift_level), spread_ = g.live(memory::shift_spread), sum = g.live(memory::shift_sum);
  const Real top = g.live(memory::shift_top), range = kShiftRange * (top - level), zero = spread<Real>(0.0);
  const Real count = g.live(memory::shift_count), armed = g.live(memory::shift_armed), left = armed - 1.0;
  Shift<Column> t;
  t.norm = norm;
  t.has_norm = has_norm;
  if (horizon == 0.0) {
    t.is_ready = t.found = Mask{};
    t.scale = zero;
    t.sum = one_nan(sum);
    t.armed = one_nan(armed);
    return t;
  }
  const Real wanders = g.live(memory::shift_wander), wander = kShiftWander * wanders;
  const Real wider = select(spread_ < wander, wander, spread_);
  t.is_ready = count >= 0.5 * horizon;
  const Real widest = select(wider < range, range, wider), share = c[config::min_std] * level;
  t.scale = select(widest < share, share, widest);
  const Real usual = g.live(memory::shift_gradient);
  const Mask knows_norm = t.is_ready & has_norm & (usual > 0.0);
  const Mask is_spike = knows_norm & (norm > c[config::shift_spike] * usual);
  const Mask is_faint = knows_norm & (norm < kShiftFaint * usual);
  t.armed = select(is_spike, spread<Real>(kShiftArmed), select(left > 0.0, left, zero));
  const Mask is_armed = t.armed > 0.0;
  Real z = (x - level) / t.scale;
  z = select(z == z, z, zero);
  z = select(is_faint & (z > 0.0), z + kShiftFaintness, z) - select(is_armed, zero, spread<Real>(c[config::shift_slack]));
  z = select(z > kShiftMost, spread<Real>(kShiftMost), select(z < kShiftLeast, spread<Real>(kShiftLeast), z));
  const Real next = sum + z, most = spread<Real>(2.0 * threshold);  // so that it comes down again
  t.sum = one_nan(select(t.is_ready, select(next > most, most, select(next > 0.0, next, zero)), sum));
  t.found = t.is_ready & (t.sum >= select(is_armed, spread<Real>(threshold / kShiftKeener), spread<Real>(threshold)));
  return t;
}

// Evidence so strong that no loss moves the level and no capture is promoted.
template <class Real>
TOLARIA_LANEWISE auto is_climbing(const double* c, const Real& sum) {
  return sum > spread<Real>(kShiftSuspicion * c[config::shift_threshold]);
}

// Remembers what was found; a loss that has joined moves level and spread while nothing is suspicious. A level below zero
// follows even then, slowly: a surrogate (a policy gradient's) rises towards zero as its policy becomes sure. A shift that
// was told is learnt: where nothing is put back, the next losses are the level.
template <class Column, class Real>
TOLARIA_LANEWISE void remember_shift(const Column& g, const double* c, const Shift<Column>& t, const Real& x,
                                     const typename Column::Mask& joins) {
  if (c[config::shift_horizon] == 0.0) return;
  const Real level = g.live(memory::shift_level), before = g.live(memory::shift_count), top = g.live(memory::shift_top);
  const Real spread_ = g.live(memory::shift_spread), most = kShiftClip * t.scale;
  const Real raised = before + 1.0;
  const Real count = select(raised < c[config::shift_horizon], raised, spread<Real>(c[config::shift_horizon]));
  Real d = x - level;
  d = select(t.is_ready & (d > most), most, select(t.is_ready & (d < -most), -most, d));
  const Real moved = level + d / count;
  const Real away = select(t.is_ready, d, x - moved);
  const Real wider = spread_ + (select(away < 0.0, -away, away) - spread_) / count;
  const Real fast = g.live(memory::shift_fast), wander = g.live(memory::shift_wander), zero = spread<Real>(0.0);
  const Real sooner = select(count < kShiftFast, count, spread<Real>(kShiftFast));
  const Real faster = fast + (level + d - fast) / sooner;
  const Real above = select(faster > moved, faster - moved, zero);
  const Real farther = wander + (above - wander) / (kShiftSlower * c[config::shift_horizon]);
  const Real usual = g.live(memory::shift_gradient), loudest = kShiftClip * usual, norm = t.norm;
  const Real heard = select(t.is_ready & (usual > 0.0) & (norm > loudest), loudest, norm);
  const Real tuned = select(usual > 0.0, usual + (heard - usual) / count, heard);
  const auto fits = is_bounded(moved) & is_bounded(wider) & is_bounded(faster) & is_bounded(farther);
  const auto climbs = is_climbing(c, t.sum);
  const auto moves = joins & !climbs & fits;
  const auto follows = joins & climbs & fits & (level < 0.0);
  g.live(memory::shift_count) = select(t.found, zero, select(moves, count, before));
  g.live(memory::shift_level) = select(moves, moved, select(follows, level + kShiftBelowZero * (d / count), level));
  g.live(memory::shift_spread) = select(moves, wider, spread_);
  g.live(memory::shift_top) = select(moves & !t.is_ready & (moved > top), moved, top);
  g.live(memory::shift_fast) = select(moves, faster, fast);
  g.live(memory::shift_wander) = select(moves & t.is_ready, farther, wander);
  g.live(memory::shift_gradient) = select(moves & t.has_norm & is_bounded(tuned), tuned, usual);
  g.live(memory::shift_sum) = select(t.found, zero, t.sum);
  g.live(memory::shift_armed) = select(t.found, zero, t.armed);
}

// One step as it reaches the judge.
template <class Column>
struct Sample {
  typename Column::Real loss;
  typename Column::Mask is_flagged;  // by the caller, like a NaN loss
  bool has_gradient;
  typename Column::Real gradient_norm;
  typename Column::Mask is_state_bad;  // a tensor of the model or of an optimizer holds a non-finite value
};

C10_HOST_DEVICE inline Moments<double> gradient_moments(const Governor& g, const Sample<Governor>& s) {
  return s.has_gradient ? window_moments(g, memory::gradient_size, g.gradients()) : Moments<double>{0.0, 0.0};
}

// What the rules say of one sample, found before anything is written.
template <class Column>
struct Findings {
  typename Column::Real std;
  Thresholds<typename Column::Real> thresholds;
  typename Column::Real steepest, drift;
  typename Column::Real climbed;  // what a verdict says of drift: the sum of the shift test where that is on
  typename Column::Mask judges_gradient, poisoned_capture, suspected, nonfinite, nonfinite_gradient, paused, collapsed, exploded,
      steep, drifted;
  ChanceLevel<Column> chance;
  Shift<Column> shift;

  // Whether the loss joins the healthy ones: no rule holds.
  TOLARIA_LANEWISE typename Column::Mask joins() const {
    return !(poisoned_capture | nonfinite | nonfinite_gradient | paused | chance.at_once | collapsed | exploded | steep |
             drifted | shift.found);
  }
};

// `m` are the moments of the losses' window, `of_gradients` those of the gradients' where there is one.
template <class Column, class Real>
TOLARIA_LANEWISE Findings<Column> find(const Column& g, const double* c, const Sample<Column>& s, const Moments<Real>& m,
                                       const Moments<Real>& of_gradients) {
  using Mask = typename Column::Mask;
  const Real x = s.loss, norm = s.gradient_norm, size = g.live(memory::history_size);
  const Real candidate = g[field::candidate], candidate_bad = g[field::candidate_bad], pause = g[field::cooldown_left];
  const Real suspect = g[field::suspect], looks = spread<Real>(c[config::suspicious_state]);
  Findings<Column> f;
  f.std = root(m.m2 / size);
  f.thresholds = thresholds(c, m.mean, f.std);
  f.steepest = spread<Real>(std::numeric_limits<double>::infinity());
  f.judges_gradient = f.nonfinite_gradient = f.steep = Mask{};
  if (s.has_gradient) {
    // Under a GradScaler an overflow is routine, and the step was left out: there is no gradient to judge.
    const Mask finite = is_bounded(norm), always = finite | !finite;
    f.judges_gradient = c[config::gradient_may_overflow] != 0.0 ? finite : always;
    f.steepest = select(f.judges_gradient, gradient_threshold(g, c, of_gradients), f.steepest);
    f.nonfinite_gradient = f.judges_gradient & !finite;
    f.steep = f.judges_gradient & (norm > f.steepest);
  }
  f.drift = drift_with(g, c, x);
  f.shift = shift_with(g, c, x, norm, f.judges_gradient);
  f.climbed = c[config::shift_horizon] != 0.0 ? f.shift.sum : f.drift;

  f.poisoned_capture = (candidate >= 0.0) & (candidate_bad >= 0.0);
  f.suspected = (candidate >= 0.0) & (suspect >= 0.0) & (looks != 0.0);
  f.nonfinite = s.is_flagged | !is_bounded(x);
  f.paused = pause > 0.0;
  f.chance = chance_level(g, c, x, m, f.std);
  f.collapsed = (f.chance.evidence >= c[config::collapse_patience]) & f.chance.learnt;
  const Mask is_short = size < c[config::min_history], is_long = !is_short, warm = x > c[config::warmup_bound];
  f.exploded = (is_short & warm) | (is_long & is_explosion(c, f.thresholds, x));
  f.drifted = f.drift > c[config::drift_threshold] * c[config::drift_horizon];
  return f;
}

// Remembers what adds up over losses, whether this one has joined the healthy ones or not.
template <class Column, class Real>
TOLARIA_LANEWISE void remember(const Column& g, const double* c, const Findings<Column>& f, const Real& x) {
  const typename Column::Mask joins = f.joins();
  remember_chance(g, c, f.chance, x, joins);
  remember_shift(g, c, f.shift, x, joins);
}

}  // namespace tolaria::math

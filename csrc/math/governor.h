// The governor's arithmetic: how one loss is judged, and when state is captured, promoted and restored (DESIGN 4, 5).
//
// One governor is one column of the field-major float64 matrix `state`, so that neighbouring governors lie side by side
// in vector lanes and coalesced loads. Every transition of that state is a function in this file; the CPU and the CUDA
// kernels only supply the loop. tolaria/reference/governor.py says the same in PyTorch and is the oracle: results are
// bit for bit equal, which holds because no file is compiled with contraction into FMA.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>
#include <limits>

#include "math/governor_rules.h"
#include "math/governor_state.h"
#include "math/magnitude.h"

namespace tolaria::math {

C10_HOST_DEVICE inline void increment(double& count) { count = one_nan(count + 1.0); }

C10_HOST_DEVICE inline void suspect(const Governor& g, const Suspect& s) {
  g[field::suspect] = s.tensor;
  g[field::suspect_since] = s.since;
  g[field::suspect_count] = s.times;
}

C10_HOST_DEVICE inline void cancel_candidate(const Governor& g) {
  g[field::candidate] = -1.0;
  g[field::candidate_done] = 0.0;
  g[field::candidate_bad] = -1.0;
  g[field::candidate_healthy] = 0.0;
  suspect(g, {});
  g[field::capture_order_0] = -1.0;
  g[field::capture_order_1] = -1.0;
}

// Orders a capture into the slot that is not the last known good one, which this never touches. Returns that slot's
// memory, into which the live one is then to be copied.
C10_HOST_DEVICE inline int order_capture(const Governor& g) {
  const int slot = 1 - slot_index(g[field::last_good]);
  cancel_candidate(g);
  g[field::candidate] = slot;
  g[field::capture_order_0] = slot;
  g[field::capture_order_1] = slot;
  increment(g[field::capture_count]);
  g[field::slot_step_0 + slot] = g[field::step];
  g[field::slot_capture_0 + slot] = g[field::capture_count];
  return 1 + slot;
}

C10_HOST_DEVICE inline void promote_candidate(const Governor& g) {
  const int slot = slot_index(g[field::candidate]);
  g[field::last_good] = slot;
  g[field::anchor_step] = g[field::due_from] = g[field::slot_step_0 + slot];
  increment(g[field::promotion_count]);
  cancel_candidate(g);
  write_slot_status(g);
  emit(g, kPromotionEvent, g[field::slot_capture_0 + slot], g[field::slot_step_0 + slot], g[field::slot_ticket_0 + slot]);
}

// The bookkeeping of a rollback whose tensors are back: the memory of the restored slot judges on from here.
C10_HOST_DEVICE inline void commit_rollback(const Governor& g, const double* c) {
  const int slot = slot_index(g[field::last_good]);
  increment(g[field::rollback_count]);
  g[field::cooldown_left] = c[config::cooldown];
  g[field::steps_lost] = one_nan(g[field::step] - g[field::anchor_step]);
  g[field::anchor_step] = g[field::due_from] = g[field::step];
  g[field::restored_capture] = g[field::slot_capture_0 + slot];
  g[field::restored_step] = g[field::slot_step_0 + slot];
  g[field::restored_ticket] = g[field::slot_ticket_0 + slot];
  g[field::restore_order] = 0.0;
  g[field::reward] = one_nan(-c[config::death_penalty]);
  copy_memory(g, 0, 1 + slot);
  cancel_candidate(g);
  write_rollback_status(g);
  emit(g, kRollbackEvent, g[field::restored_capture], g[field::restored_step], g[field::restored_ticket]);
}

// An order from outside the rule: a manual rollback or capture, the promotion of the attach-time capture, or that the
// shift test is to learn the level anew, since the learning rate was raised on purpose; to hold is to capture and promote
// nothing until released, since what was validated is bad.
C10_HOST_DEVICE inline void give_order(const Governor& g, const double* c, Order order, Reason reason, double tensor) {
  if (order == kOrderRollback) {
    if (g[field::rollback] == 0.0 || reason == kNonFiniteState) {
      g[field::reason] = reason;
      g[field::tensor_index] = tensor;
      g[field::rollback] = 1.0;
      write_status(g);
      emit(g, kVerdictEvent, -1.0, -1.0, 0.0);
    }
    g[field::restore_order] = g[field::attached];
    if (g[field::attached] == 0.0) commit_rollback(g, c);
  } else if (order == kOrderCapture) {
    copy_memory(g, order_capture(g), 0);
  } else if (order == kOrderPromote) {
    if (g[field::candidate] >= 0.0) promote_candidate(g);
  } else if (order == kOrderRelearn) {
    g.live(memory::shift_count) = 0.0;
    g.live(memory::shift_sum) = 0.0;
    g.live(memory::shift_armed) = 0.0;
  } else if (order == kOrderHold || order == kOrderRelease) {
    g.live(memory::held) = order == kOrderHold ? 1.0 : 0.0;
  } else {
    clear_memory(g, 0);
    for (int f = field::life_count; f <= field::life_max; ++f) g[f] = 0.0;
    g[field::cooldown_left] = 0.0;
  }
  write_status(g);
}

// A capture part has been copied; `bad` is the index of the first tensor holding a non-finite value, or -1, `found` the
// tensor of suspicious magnitude, and `ticket` the host's number of the launch. No status word changes.
C10_HOST_DEVICE inline void finish_capture_part(const Governor& g, int part, double bad, const Suspect& found,
                                                double ticket) {
  g[field::capture_order_0 + part] = -1.0;
  const int done = parts_in(g[field::candidate_done]) | (1 << part);
  g[field::candidate_done] = done;
  if (bad >= 0.0 && (g[field::candidate_bad] < 0.0 || bad < g[field::candidate_bad])) g[field::candidate_bad] = bad;
  suspect(g, later_of({g[field::suspect], g[field::suspect_since], g[field::suspect_count]}, found));
  if (done == kAllPartsDone) {
    const int slot = slot_index(g[field::candidate]);
    g[field::slot_ticket_0 + slot] = ticket;
    emit(g, kCaptureEvent, g[field::slot_capture_0 + slot], g[field::slot_step_0 + slot], ticket);
  }
}

// Makes room in a window of the live memory that begins at `first`: a full one loses its oldest.
template <class Column>
TOLARIA_LANEWISE void shift_full(const Column& g, int size_field, int first) {
  using Real = typename Column::Real;
  const Real size = g.live(size_field);
  const auto full = size >= static_cast<double>(g.window);
  if (!any(full)) return;
  Real older = g.live(first);
  for (int i = first; i < first + g.window - 1; ++i) {
    const Real newer = g.live(i + 1);
    g.live(i) = select(full, newer, older);
    older = newer;
  }
}

// Appends to a window that has room, or that shift_full has made room in.
C10_HOST_DEVICE inline void append(const Governor& g, int size_field, int first, double value) {
  int size = entries_in(g.live(size_field), g.window);
  if (size == g.window) --size;
  g.live(first + size) = value;
  g.live(size_field) = size + 1.0;
}

// A healthy step, but for the windows: x joins the lifetime statistics and the drift test's baseline.
template <class Column, class Real>
TOLARIA_LANEWISE void accept(const Column& g, const double* c, const Real& x, const Findings<Column>& f) {
  if (c[config::drift_horizon] != 0.0) {
    g.live(memory::drift_sum) = f.drift;
    move_baseline(g, c, x);
  }
  g.live(memory::last_healthy) = x;
  g.live(memory::consecutive) = spread<Real>(0.0);
  g.live(memory::lobotomy_pending) = spread<Real>(0.0);
  g.live(memory::skips) = spread<Real>(0.0);

  const Real least = g[field::life_min], most = g[field::life_max], earlier = g[field::life_count];
  const Real count = earlier + 1.0;
  const Moments<Real> life = welford({g[field::life_mean], g[field::life_m2]}, x, count);
  g[field::life_min] = select((count == 1.0) | (x < least), x, least);
  g[field::life_max] = select((count == 1.0) | (x > most), x, most);
  g[field::life_count] = one_nan(count);
  g[field::life_mean] = one_nan(life.mean);
  g[field::life_m2] = one_nan(life.m2);
}

// Candidate and capture orders after a verdict. `paused` (cooldown) neither promotes nor orders, nor does evidence of a
// collapse or of a shift; a `suspicious` candidate goes, and the next comes when it would have come had this one been promoted.
// Returns as order_capture does, or 0 where no capture is ordered.
C10_HOST_DEVICE inline int advance_slots(const Governor& g, const double* c, bool healthy, bool paused, bool suspicious) {
  if (g[field::attached] == 0.0) return 0;
  const bool waits = paused || g.live(memory::collapse) > 0.0 || is_climbing(c, g.live(memory::shift_sum)) ||
                     g.live(memory::held) != 0.0;
  if (g[field::candidate] >= 0.0) {
    if (suspicious) {
      g[field::due_from] = g[field::slot_step_0 + slot_index(g[field::candidate])];
      cancel_candidate(g);
      write_slot_status(g);
    } else if (!healthy || g[field::candidate_done] != kAllPartsDone) {
      cancel_candidate(g);
    } else if (!waits) {
      increment(g[field::candidate_healthy]);
      if (g[field::candidate_healthy] >= c[config::probation]) promote_candidate(g);
    }
  }
  const bool due = g[field::step] - g[field::due_from] >= c[config::snapshot_interval];
  const bool orders = healthy && !waits && due && g[field::candidate] < 0.0 && c[config::log_only] == 0.0;
  if (!orders) return 0;
  const int captured = order_capture(g);
  write_slot_status(g);
  return captured;
}

// The verdict's fields, but for the count of panics, which follows from what is done to the memory.
template <class Column, class Real>
TOLARIA_LANEWISE void write_verdict(const Column& g, const Sample<Column>& s, const Moments<Real>& m,
                                    const Findings<Column>& f, Reason reason, bool rollback) {
  const Real size = g.live(memory::history_size), bad = g[field::candidate_bad], steps = g[field::step];
  const Real nan = spread<Real>(std::numeric_limits<double>::quiet_NaN()), none = spread<Real>(-1.0);
  const auto is_known = size > 0.0;
  g[field::step] = one_nan(steps + 1.0);
  g[field::reason] = spread<Real>(reason);
  g[field::rollback] = spread<Real>(rollback);
  g[field::loss] = one_nan(s.loss);
  g[field::mean] = select(is_known, one_nan(m.mean), nan);
  g[field::std] = select(is_known, one_nan(f.std), nan);
  g[field::threshold_absolute] = one_nan(f.thresholds.absolute);
  g[field::threshold_statistical] = select(is_known, one_nan(f.thresholds.statistical), nan);
  g[field::threshold_multiplier] = select(is_known, one_nan(f.thresholds.multiplier), nan);
  g[field::gradient_norm] = select(f.judges_gradient, one_nan(s.gradient_norm), none);
  g[field::gradient_threshold] = one_nan(f.steepest);
  g[field::drift] = f.climbed;
  g[field::tensor_index] = select(f.poisoned_capture, bad, none);
  g[field::reward] = spread<Real>(0.0);
}

// Whether an unhealthy step is to be left out instead of rolled back: so many in a row are, while the state is finite.
C10_HOST_DEVICE inline bool may_skip(const Governor& g, const double* c, const Sample<Governor>& s) {
  return !s.is_state_bad && g.live(memory::skips) < c[config::skips_before_rollback];
}

// Whether the level of the candidate's suspect has lasted: then it is no accident, but what the training makes of the state.
C10_HOST_DEVICE inline bool is_settled(const Governor& g, const double* c) {
  if (c[config::suspicious_state] == kUndoes) return g[field::suspect_count] >= kSuspectedAgain;
  const double captured = g[field::slot_step_0 + slot_index(g[field::candidate])];
  return captured - g[field::suspect_since] >= kSettledIntervals * c[config::snapshot_interval];
}

// Tells of the candidate's suspect, beside the verdict on the loss, which stays what it is.
C10_HOST_DEVICE inline void tell_of_suspect(const Governor& g, EventKind kind) {
  const VerdictWords of_loss = verdict_words(g);
  const int slot = slot_index(g[field::candidate]);
  g[field::reason] = kSuspiciousState;
  g[field::rollback] = 0.0;
  g[field::tensor_index] = g[field::suspect];
  emit(g, kind, g[field::slot_capture_0 + slot], g[field::slot_step_0 + slot], 0.0);
  g[field::reason] = of_loss.reason;
  g[field::rollback] = of_loss.rollback;
  g[field::tensor_index] = of_loss.tensor_index;
}

// Judges one sample (DESIGN 4, rules 1 to 5 and options); the moments are as for `find`.
C10_HOST_DEVICE inline void judge(const Governor& g, const double* c, const Sample<Governor>& s, Moments<double> m,
                                  Moments<double> of_gradients) {
  const Findings<Governor> f = find(g, c, s, m, of_gradients);
  const bool suspicious = f.suspected && !f.poisoned_capture && !is_settled(g, c);
  const bool is_state_bad = f.poisoned_capture || (suspicious && c[config::suspicious_state] == kUndoes);
  Reason reason = kHealthy;
  bool rollback = false, paused = false;
  if (is_state_bad) {
    reason = f.poisoned_capture ? kNonFiniteState : kSuspiciousState;
    rollback = true;
  } else if (f.nonfinite) {
    reason = kNonFinite;
    rollback = true;
  } else if (f.nonfinite_gradient) {
    reason = kGradientNorm;
    rollback = true;
  } else if (f.paused) {
    paused = true;
  } else if (f.chance.at_once || f.collapsed) {
    reason = kLobotomy;
    if (f.chance.at_once) increment(g.live(memory::lobotomy_pending));
    rollback = f.collapsed || g.live(memory::lobotomy_pending) >= c[config::lobotomy_patience];
  } else if (f.shift.found) {
    reason = kDrift;
    rollback = true;
  } else if (f.exploded || f.steep) {
    reason = f.exploded ? kAnomaly : kGradientNorm;
    increment(g.live(memory::consecutive));
    rollback = g.live(memory::consecutive) >= c[config::min_panics_before_rollback];
  } else if (f.drifted) {
    reason = kDrift;
    rollback = true;
  }
  // A shift is no bad step that could be left out, but many.
  if (rollback && !is_state_bad && reason != kDrift && may_skip(g, c, s)) rollback = false;
  if (reason != kHealthy && !rollback) increment(g.live(memory::skips));

  const VerdictWords before = verdict_words(g);
  write_verdict(g, s, m, f, reason, rollback);
  if (is_state_bad && !f.poisoned_capture) g[field::tensor_index] = g[field::suspect];
  if (g[field::cooldown_left] > 0.0) g[field::cooldown_left] -= 1.0;
  const bool joins = f.joins() && !is_state_bad;
  if (joins) {
    shift_full(g, memory::history_size, g.losses());
    append(g, memory::history_size, g.losses(), s.loss);
    if (f.judges_gradient) {
      shift_full(g, memory::gradient_size, g.gradients());
      append(g, memory::gradient_size, g.gradients(), s.gradient_norm);
    }
    accept(g, c, s.loss, f);
  }
  if (!is_state_bad && !f.nonfinite && !f.nonfinite_gradient && !paused) remember(g, c, f, s.loss);
  g[field::panics] = g.live(memory::consecutive);

  const bool acts = rollback && c[config::log_only] == 0.0;
  const bool attached = g[field::attached] != 0.0;
  g[field::restore_order] = acts && attached ? 1.0 : 0.0;
  write_verdict_status(g, before);
  if (reason != kHealthy) emit(g, kVerdictEvent, -1.0, -1.0, 0.0);
  if (f.suspected && !is_state_bad) {
    tell_of_suspect(g, suspicious ? kVerdictEvent : kAcceptanceEvent);
    if (!suspicious) suspect(g, {});
  }
  const int captured = advance_slots(g, c, reason == kHealthy, paused, suspicious);
  if (captured > 0) copy_memory(g, captured, 0);
  if (acts && !attached) commit_rollback(g, c);
}

}  // namespace tolaria::math

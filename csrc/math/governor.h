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

namespace tolaria::math {

C10_HOST_DEVICE inline void cancel_candidate(const Governor& g) {
  g[field::candidate] = -1.0;
  g[field::candidate_done] = 0.0;
  g[field::candidate_bad] = -1.0;
  g[field::candidate_healthy] = 0.0;
  g[field::capture_order_0] = -1.0;
  g[field::capture_order_1] = -1.0;
}

// Orders a capture into the slot that is not the last known good one, which this never touches.
C10_HOST_DEVICE inline void order_capture(const Governor& g) {
  const double slot = 1.0 - g[field::last_good];
  cancel_candidate(g);
  g[field::candidate] = slot;
  g[field::capture_order_0] = slot;
  g[field::capture_order_1] = slot;
  g[field::capture_count] += 1.0;
  const int s = static_cast<int>(slot);
  g[field::slot_step_0 + s] = g[field::step];
  g[field::slot_capture_0 + s] = g[field::capture_count];
  copy_memory(g, 1 + s, 0);
}

C10_HOST_DEVICE inline void promote_candidate(const Governor& g) {
  const int slot = static_cast<int>(g[field::candidate]);
  g[field::last_good] = slot;
  g[field::anchor_step] = g[field::slot_step_0 + slot];
  g[field::promotion_count] += 1.0;
  cancel_candidate(g);
  emit(g, kPromotionEvent, g[field::slot_capture_0 + slot], g[field::slot_step_0 + slot]);
}

// The bookkeeping of a rollback whose tensors are back: the memory of the restored slot judges on from here.
C10_HOST_DEVICE inline void commit_rollback(const Governor& g, const double* c) {
  const int slot = static_cast<int>(g[field::last_good]);
  g[field::rollback_count] += 1.0;
  g[field::cooldown_left] = c[config::cooldown];
  g[field::steps_lost] = g[field::step] - g[field::anchor_step];
  g[field::anchor_step] = g[field::step];
  g[field::restored_capture] = g[field::slot_capture_0 + slot];
  g[field::restored_step] = g[field::slot_step_0 + slot];
  g[field::restore_order] = 0.0;
  g[field::reward] = -c[config::death_penalty];
  copy_memory(g, 0, 1 + slot);
  cancel_candidate(g);
  emit(g, kRollbackEvent, g[field::restored_capture], g[field::restored_step]);
}

// An order from outside the rule: a manual rollback or capture, or the promotion of the attach-time capture.
C10_HOST_DEVICE inline void give_order(const Governor& g, const double* c, Order order, Reason reason, double tensor) {
  if (order == kOrderRollback) {
    if (g[field::rollback] == 0.0 || reason == kNonFiniteState) {
      g[field::reason] = reason;
      g[field::tensor_index] = tensor;
      g[field::rollback] = 1.0;
      emit(g, kVerdictEvent, -1.0, -1.0);
    }
    g[field::restore_order] = g[field::attached];
    if (g[field::attached] == 0.0) commit_rollback(g, c);
  } else if (order == kOrderCapture) {
    order_capture(g);
  } else if (order == kOrderPromote) {
    if (g[field::candidate] >= 0.0) promote_candidate(g);
  } else {
    clear_memory(g, 0);
    for (int f = field::life_count; f <= field::life_max; ++f) g[f] = 0.0;
    g[field::cooldown_left] = 0.0;
  }
  write_status(g);
}

// A capture part has been copied; `bad` is the index of the first tensor holding a non-finite value, or -1.
C10_HOST_DEVICE inline void finish_capture_part(const Governor& g, int part, double bad) {
  g[field::capture_order_0 + part] = -1.0;
  const int done = static_cast<int>(g[field::candidate_done]) | (1 << part);
  g[field::candidate_done] = done;
  if (bad >= 0.0 && (g[field::candidate_bad] < 0.0 || bad < g[field::candidate_bad])) g[field::candidate_bad] = bad;
  if (done == kAllPartsDone) {
    const int slot = static_cast<int>(g[field::candidate]);
    emit(g, kCaptureEvent, g[field::slot_capture_0 + slot], g[field::slot_step_0 + slot]);
    write_status(g);
  }
}

// Appends a value to a window of the live memory that begins at `first`; a full one loses its oldest.
C10_HOST_DEVICE inline void push(const Governor& g, int size_field, int first, double value) {
  int size = static_cast<int>(g.live(size_field));
  if (size == g.window) {
    for (int i = first + 1; i < first + size; ++i) g.live(i - 1) = g.live(i);
    --size;
  }
  g.live(first + size) = value;
  g.live(size_field) = size + 1.0;
}

// A healthy step: x joins H, the lifetime statistics and the drift test's baseline, the gradient its own window.
C10_HOST_DEVICE inline void accept(const Governor& g, const double* c, double x, Gradient gradient, double drift) {
  push(g, memory::history_size, g.losses(), x);
  if (gradient.is_known) push(g, memory::gradient_size, g.gradients(), gradient.norm);
  if (c[config::drift_horizon] != 0.0) {
    g.live(memory::drift_sum) = drift;
    move_baseline(g, c, x);
  }
  g.live(memory::last_healthy) = x;
  g.live(memory::consecutive) = 0.0;
  g.live(memory::lobotomy_pending) = 0.0;

  const double count = g[field::life_count] + 1.0;
  const Moments life = welford({g[field::life_mean], g[field::life_m2]}, x, count);
  g[field::life_min] = count == 1.0 || x < g[field::life_min] ? x : g[field::life_min];
  g[field::life_max] = count == 1.0 || x > g[field::life_max] ? x : g[field::life_max];
  g[field::life_count] = count;
  g[field::life_mean] = one_nan(life.mean);
  g[field::life_m2] = one_nan(life.m2);
}

// Candidate and capture orders after a verdict. `paused` (cooldown) neither promotes nor orders.
C10_HOST_DEVICE inline void advance_slots(const Governor& g, const double* c, bool healthy, bool paused) {
  if (g[field::candidate] >= 0.0) {
    if (!healthy || g[field::candidate_done] != kAllPartsDone) {
      cancel_candidate(g);
    } else if (!paused) {
      g[field::candidate_healthy] += 1.0;
      if (g[field::candidate_healthy] >= c[config::probation]) promote_candidate(g);
    }
  }
  const bool due = g[field::step] - g[field::anchor_step] >= c[config::snapshot_interval];
  if (healthy && !paused && due && g[field::candidate] < 0.0 && c[config::log_only] == 0.0) order_capture(g);
}

// Judges one loss (DESIGN 4, rules 1 to 5 and options). `m` are the moments of H; `nonfinite` is the caller's own flag.
C10_HOST_DEVICE inline void judge(const Governor& g, const double* c, Moments m, double x, bool nonfinite,
                                  Gradient gradient) {
  const double size = g.live(memory::history_size);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double std = std::sqrt(m.m2 / size);
  const Thresholds t = thresholds(c, m.mean, std);
  const bool poisoned_capture = g[field::candidate] >= 0.0 && g[field::candidate_bad] >= 0.0;
  // Under a GradScaler an overflow is routine, and the step was left out: there is no gradient to judge.
  if (!is_finite(gradient.norm) && c[config::gradient_may_overflow] != 0.0) gradient.is_known = false;
  const double steepest = gradient.is_known ? gradient_threshold(g, c) : std::numeric_limits<double>::infinity();
  const bool exploded = size < c[config::min_history] ? x > c[config::warmup_bound] : is_explosion(c, t, x);
  const double drift = drift_with(g, c, x);

  Reason reason = kHealthy;
  bool rollback = false, joins = false, paused = false;
  if (poisoned_capture) {
    reason = kNonFiniteState;
    rollback = true;
  } else if (nonfinite || !is_finite(x)) {
    reason = kNonFinite;
    rollback = true;
  } else if (gradient.is_known && !is_finite(gradient.norm)) {
    reason = kGradientNorm;
    rollback = true;
  } else if (g[field::cooldown_left] > 0.0) {
    paused = true;
  } else if (is_chance_level(g, c, x)) {
    reason = kLobotomy;
    g.live(memory::lobotomy_pending) += 1.0;
    rollback = g.live(memory::lobotomy_pending) >= c[config::lobotomy_patience];
  } else if (exploded || (gradient.is_known && gradient.norm > steepest)) {
    reason = exploded ? kAnomaly : kGradientNorm;
    g.live(memory::consecutive) += 1.0;
    rollback = g.live(memory::consecutive) >= c[config::min_panics_before_rollback];
  } else if (drift > c[config::drift_threshold] * c[config::drift_horizon]) {
    reason = kDrift;
    rollback = true;
  } else {
    joins = true;
  }

  g[field::step] += 1.0;
  g[field::reason] = reason;
  g[field::rollback] = rollback ? 1.0 : 0.0;
  g[field::loss] = one_nan(x);
  g[field::mean] = size > 0.0 ? one_nan(m.mean) : nan;
  g[field::std] = size > 0.0 ? one_nan(std) : nan;
  g[field::threshold_absolute] = t.absolute;
  g[field::threshold_statistical] = size > 0.0 ? one_nan(t.statistical) : nan;
  g[field::threshold_multiplier] = size > 0.0 ? t.multiplier : nan;
  g[field::gradient_norm] = gradient.is_known ? one_nan(gradient.norm) : -1.0;
  g[field::gradient_threshold] = one_nan(steepest);
  g[field::drift] = drift;
  g[field::tensor_index] = poisoned_capture ? g[field::candidate_bad] : -1.0;
  g[field::reward] = 0.0;
  if (g[field::cooldown_left] > 0.0) g[field::cooldown_left] -= 1.0;
  if (joins) accept(g, c, x, gradient, drift);
  g[field::panics] = g.live(memory::consecutive);

  const bool acts = rollback && c[config::log_only] == 0.0;
  const bool attached = g[field::attached] != 0.0;
  g[field::restore_order] = acts && attached ? 1.0 : 0.0;
  if (reason != kHealthy) emit(g, kVerdictEvent, -1.0, -1.0);
  if (attached) advance_slots(g, c, reason == kHealthy, paused);
  if (acts && !attached) commit_rollback(g, c);
  write_status(g);
}

}  // namespace tolaria::math

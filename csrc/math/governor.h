// The governor's arithmetic: how one loss is judged, and when state is captured, promoted and restored (DESIGN 4, 5).
//
// One governor is one column of the field-major float64 matrix `state`, so that neighbouring governors lie side by side
// in vector lanes and coalesced loads. Every transition of that state is a function in this file; the CPU and the CUDA
// kernels only supply the loop. tolaria/reference/governor.py says the same in PyTorch and is the oracle: results are
// bit for bit equal, which holds because no file is compiled with contraction into FMA.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "math/governor_fields.h"

namespace tolaria::math {

// A column of `state`; memory 0 is the live one, 1 and 2 are the slots'.
struct Governor {
  double* column;
  int64_t stride;  // number of governors
  int window;
  double* mailbox;  // status words and ring of this governor, or null
  int64_t ring_records;

  C10_HOST_DEVICE double& operator[](int f) const { return column[f * stride]; }
  C10_HOST_DEVICE double& recall(int which, int m) const {
    return column[(field::count + which * (memory::count + window) + m) * stride];
  }
  C10_HOST_DEVICE double& live(int m) const { return recall(0, m); }
  C10_HOST_DEVICE double& loss_at(int i) const { return recall(0, memory::count + i); }
};

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

C10_HOST_DEVICE inline Moments window_moments(const Governor& g) {
  Moments m{0.0, 0.0};
  const int size = static_cast<int>(g.live(memory::history_size));
  for (int i = 0; i < size; ++i) m = welford(m, g.loss_at(i), i + 1.0);
  return m;
}

C10_HOST_DEVICE inline bool is_finite(double x) { return x - x == 0.0; }

// Makes what this thread wrote visible to the host before what it writes next.
C10_HOST_DEVICE inline void publish() {
#ifdef __CUDA_ARCH__
  __threadfence_system();
#endif
}

// The rollback count comes last: a host that sees it move finds the words that describe that rollback.
C10_HOST_DEVICE inline void write_status(const Governor& g) {
  if (g.mailbox == nullptr) return;
  double* s = g.mailbox;
  const int good = static_cast<int>(g[field::last_good]);
  s[status::step] = g[field::step];
  s[status::reason] = g[field::reason];
  s[status::rollback] = g[field::rollback];
  s[status::restored_capture] = g[field::restored_capture];
  s[status::restored_step] = g[field::restored_step];
  s[status::last_good_capture] = g[field::slot_capture_0 + good];
  s[status::last_good_step] = g[field::slot_step_0 + good];
  s[status::capture_count] = g[field::capture_count];
  s[status::promotion_count] = g[field::promotion_count];
  s[status::tensor_index] = g[field::tensor_index];
  s[status::anchor_step] = g[field::anchor_step];
  publish();
  s[status::rollback_count] = g[field::rollback_count];
}

// Appends one record to the ring; the count of records is written after the record itself.
C10_HOST_DEVICE inline void emit(const Governor& g, EventKind kind, double capture_id, double capture_step) {
  const double sequence = g[field::events];
  g[field::events] = sequence + 1.0;
  if (g.mailbox == nullptr || g.ring_records == 0) return;
  double* r = g.mailbox + status::count + (static_cast<int64_t>(sequence) % g.ring_records) * record::count;
  r[record::kind] = kind;
  r[record::step] = g[field::step];
  r[record::reason] = g[field::reason];
  r[record::rollback] = g[field::rollback];
  r[record::loss] = g[field::loss];
  r[record::mean] = g[field::mean];
  r[record::std] = g[field::std];
  r[record::threshold_absolute] = g[field::threshold_absolute];
  r[record::threshold_statistical] = g[field::threshold_statistical];
  r[record::threshold_multiplier] = g[field::threshold_multiplier];
  r[record::panics] = g[field::panics];
  r[record::tensor_index] = g[field::tensor_index];
  r[record::capture_id] = capture_id;
  r[record::capture_step] = capture_step;
  r[record::steps_lost] = g[field::steps_lost];
  r[record::rollback_count] = g[field::rollback_count];
  publish();
  g.mailbox[status::events] = sequence + 1.0;
}

C10_HOST_DEVICE inline void copy_memory(const Governor& g, int to, int from) {
  for (int m = 0; m < memory::count + g.window; ++m) g.recall(to, m) = g.recall(from, m);
}

C10_HOST_DEVICE inline void clear_memory(const Governor& g, int which) {
  for (int m = 0; m < memory::count + g.window; ++m) g.recall(which, m) = 0.0;
}

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

struct Thresholds {
  double absolute, statistical, multiplier;
};

C10_HOST_DEVICE inline Thresholds thresholds(const double* c, double mean, double std) {
  const double floor = c[config::min_std] * (mean < 0.0 ? -mean : mean);
  const double infinity = std::numeric_limits<double>::infinity();
  Thresholds t;
  t.absolute = c[config::absolute_threshold];
  t.statistical = mean + c[config::sensitivity] * (std < floor ? floor : std);
  // The multiplier says nothing about a mean that is not positive: it always agrees in "all", never trips in "any".
  t.multiplier = mean > 0.0 ? c[config::multiplier] * mean : (c[config::rule_any] != 0.0 ? infinity : -infinity);
  return t;
}

C10_HOST_DEVICE inline bool is_explosion(const double* c, const Thresholds& t, double x) {
  const bool absolute = x > t.absolute, statistical = x > t.statistical, multiplier = x > t.multiplier;
  return c[config::rule_any] != 0.0 ? (absolute || statistical || multiplier) : (absolute && statistical && multiplier);
}

C10_HOST_DEVICE inline bool is_chance_level(const Governor& g, const double* c, double x) {
  const double guess = c[config::random_guess_loss];  // NaN where there is none: every comparison below is then false
  return g.live(memory::history_size) >= c[config::min_history] &&
         g.live(memory::last_healthy) < c[config::lobotomy_healthy_below] * guess &&
         x >= c[config::lobotomy_low] * guess && x <= c[config::lobotomy_high] * guess;
}

// x joins H and the lifetime statistics.
C10_HOST_DEVICE inline void accept(const Governor& g, double x) {
  int size = static_cast<int>(g.live(memory::history_size));
  if (size == g.window) {
    for (int i = 1; i < size; ++i) g.loss_at(i - 1) = g.loss_at(i);
    --size;
  }
  g.loss_at(size) = x;
  g.live(memory::history_size) = size + 1.0;
  g.live(memory::last_healthy) = x;
  g.live(memory::consecutive) = 0.0;
  g.live(memory::lobotomy_pending) = 0.0;

  const double count = g[field::life_count] + 1.0;
  const Moments life = welford({g[field::life_mean], g[field::life_m2]}, x, count);
  g[field::life_min] = count == 1.0 || x < g[field::life_min] ? x : g[field::life_min];
  g[field::life_max] = count == 1.0 || x > g[field::life_max] ? x : g[field::life_max];
  g[field::life_count] = count;
  g[field::life_mean] = life.mean;
  g[field::life_m2] = life.m2;
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

// Judges one loss (DESIGN 4, rules 1 to 5). `m` are the moments of H; `nonfinite` is the caller's own flag.
C10_HOST_DEVICE inline void judge(const Governor& g, const double* c, Moments m, double x, bool nonfinite) {
  const double size = g.live(memory::history_size);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double std = std::sqrt(m.m2 / size);
  const Thresholds t = thresholds(c, m.mean, std);
  const bool poisoned_capture = g[field::candidate] >= 0.0 && g[field::candidate_bad] >= 0.0;

  Reason reason = kHealthy;
  bool rollback = false, joins = false, paused = false;
  if (poisoned_capture) {
    reason = kNonFiniteState;
    rollback = true;
  } else if (nonfinite || !is_finite(x)) {
    reason = kNonFinite;
    rollback = true;
  } else if (g[field::cooldown_left] > 0.0) {
    paused = true;
  } else if (is_chance_level(g, c, x)) {
    reason = kLobotomy;
    g.live(memory::lobotomy_pending) += 1.0;
    rollback = g.live(memory::lobotomy_pending) >= c[config::lobotomy_patience];
  } else if (size < c[config::min_history] ? x > c[config::warmup_bound] : is_explosion(c, t, x)) {
    reason = kAnomaly;
    g.live(memory::consecutive) += 1.0;
    rollback = g.live(memory::consecutive) >= c[config::min_panics_before_rollback];
  } else {
    joins = true;
  }

  g[field::step] += 1.0;
  g[field::reason] = reason;
  g[field::rollback] = rollback ? 1.0 : 0.0;
  g[field::loss] = x;
  g[field::mean] = size > 0.0 ? m.mean : nan;
  g[field::std] = size > 0.0 ? std : nan;
  g[field::threshold_absolute] = t.absolute;
  g[field::threshold_statistical] = size > 0.0 ? t.statistical : nan;
  g[field::threshold_multiplier] = size > 0.0 ? t.multiplier : nan;
  g[field::tensor_index] = poisoned_capture ? g[field::candidate_bad] : -1.0;
  g[field::reward] = 0.0;
  if (g[field::cooldown_left] > 0.0) g[field::cooldown_left] -= 1.0;
  if (joins) accept(g, x);
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

// The layout of the governor's tensors, as lists of names. The op governor_fields() hands the names to Python, where a
// test compares them with tolaria/reference/governor_layout.py; no offset is written down anywhere else.
#pragma once

namespace tolaria::math {

// One governor: a column of the float64 matrix `state`, followed by three memories (live, slot 0, slot 1).
#define TOLARIA_GOVERNOR_FIELDS(X)                                                                       \
  /* the last verdict: what a Verdict copies */                                                          \
  X(step) X(reason) X(rollback) X(loss) X(mean) X(std) X(threshold_absolute) X(threshold_statistical)    \
  X(threshold_multiplier) X(gradient_norm) X(gradient_threshold) X(drift) X(panics) X(tensor_index)      \
  X(reward)                                                                                              \
  /* orders for the snapshot ops: the slot to write, per capture part (-1: none); 1 if a restore is due */ \
  X(capture_order_0) X(capture_order_1) X(restore_order)                                                 \
  /* Welford statistics of all healthy losses; these never go back */                                    \
  X(life_count) X(life_mean) X(life_m2) X(life_min) X(life_max)                                          \
  X(cooldown_left) X(rollback_count) X(capture_count) X(promotion_count) X(attached)                     \
  /* the double buffer: candidate -1 means none; candidate_done is a bit per capture part; a ticket is    \
     the number that the host gave the launch of a capture, 0 where a graph replay made it; the suspect   \
     is the tensor whose magnitude nobody would have expected, -1: none (math/magnitude.h) */            \
  X(last_good) X(candidate) X(candidate_done) X(candidate_bad) X(candidate_healthy) X(anchor_step)       \
  X(suspect) X(suspect_since) X(suspect_count) X(due_from)                                               \
  X(slot_step_0) X(slot_step_1) X(slot_capture_0) X(slot_capture_1) X(slot_ticket_0) X(slot_ticket_1)    \
  X(restored_capture) X(restored_step) X(restored_ticket) X(steps_lost) X(events)

// What belongs to the state that was judged, so goes back with it; followed by `window` losses, oldest first, and by
// `window` gradient norms.
#define TOLARIA_GOVERNOR_MEMORY(X)                                                                       \
  X(history_size) X(last_healthy) X(consecutive) X(lobotomy_pending) X(gradient_size)                    \
  X(drift_count) X(drift_mean) X(drift_variance) X(drift_sum) X(skips)                                   \
  X(learnt) X(learnt_level) X(collapse)                                                                  \
  X(shift_count) X(shift_level) X(shift_spread) X(shift_top) X(shift_fast) X(shift_wander) X(shift_sum)   \
  X(shift_gradient) X(shift_armed) X(held)

#define TOLARIA_GOVERNOR_CONFIG(X)                                                                       \
  X(window) X(min_history) X(absolute_threshold) X(sensitivity) X(multiplier) X(rule_any) X(min_std)     \
  X(warmup_bound) X(min_panics_before_rollback) X(random_guess_loss) X(lobotomy_healthy_below)           \
  X(lobotomy_low) X(lobotomy_high) X(lobotomy_patience) X(cooldown) X(snapshot_interval) X(probation)    \
  X(log_only) X(death_penalty) X(gradient_multiplier) X(gradient_may_overflow)                           \
  X(drift_horizon) X(drift_slack) X(drift_threshold) X(skips_before_rollback)                            \
  X(lobotomy_classic) X(collapse_patience)                                                               \
  X(shift_horizon) X(shift_slack) X(shift_threshold) X(shift_spike) X(suspicious_state)

// A mailbox row: status words, then a ring of records. The device writes it, the host only reads.
#define TOLARIA_GOVERNOR_STATUS(X)                                                                       \
  X(events) X(step) X(reason) X(rollback) X(rollback_count) X(restored_capture) X(restored_step)         \
  X(last_good_capture) X(last_good_step) X(capture_count) X(promotion_count) X(tensor_index) X(due_from)        \
  X(restored_ticket) X(last_good_ticket)
#define TOLARIA_GOVERNOR_RECORD(X)                                                                       \
  X(kind) X(step) X(reason) X(rollback) X(loss) X(mean) X(std) X(threshold_absolute)                     \
  X(threshold_statistical) X(threshold_multiplier) X(gradient_norm) X(gradient_threshold) X(drift)       \
  X(panics) X(tensor_index) X(capture_id) X(capture_step) X(steps_lost) X(rollback_count)  \
  X(ticket)

#define TOLARIA_ENTRY(name) name,
namespace field {
enum : int { TOLARIA_GOVERNOR_FIELDS(TOLARIA_ENTRY) count };
}
namespace memory {
enum : int { TOLARIA_GOVERNOR_MEMORY(TOLARIA_ENTRY) count };
}
namespace config {
enum : int { TOLARIA_GOVERNOR_CONFIG(TOLARIA_ENTRY) count };
}
namespace status {
enum : int { TOLARIA_GOVERNOR_STATUS(TOLARIA_ENTRY) count };
}
namespace record {
enum : int { TOLARIA_GOVERNOR_RECORD(TOLARIA_ENTRY) count };
}
#undef TOLARIA_ENTRY

enum Reason : int {
  kHealthy = 0,
  kNonFinite = 1,
  kLobotomy = 2,
  kAnomaly = 3,
  kNonFiniteState = 4,
  kManual = 5,
  kGradientNorm = 6,
  kDrift = 7,
  kSuspiciousState = 8,
  kValidation = 9,
  kReasons
};
enum EventKind : int {
  kVerdictEvent = 0,
  kCaptureEvent = 1,
  kPromotionEvent = 2,
  kRollbackEvent = 3,
  kAcceptanceEvent = 4
};
enum Order : int {
  kOrderRollback = 0,
  kOrderCapture = 1,
  kOrderPromote = 2,
  kOrderForget = 3,
  kOrderRelearn = 4,
  kOrderHold = 5,
  kOrderRelease = 6,
  kOrders
};

constexpr double kUndoes = 2.0;  // of config::suspicious_state: 0 off, 1 tell, 2 roll back
constexpr int kMaxWindow = 4096;
constexpr double kMaxCount = 9007199254740992.0;  // 2^53: above it a float64 does not count on
constexpr double kDriftClip = 2.0;    // standard deviations that one loss adds to the drift sum at most
constexpr double kLevelHorizon = 64.0;  // losses over which the learnt level forgets
constexpr double kWorseThanChance = 0.25;  // what a loss above the band of chance level adds to the evidence of a collapse
// The shift test, in mean absolute deviations or in shares of what they stand beside; chosen in bench/train/arena.py.
constexpr double kShiftMost = 2.0;        // what one loss adds to the sum at most
constexpr double kShiftLeast = -1.0;      // and at least
constexpr double kShiftClip = 4.0;        // how far a loss may pull level and spread
constexpr double kShiftRange = 0.02;      // of what the losses have come down, counted as spread at least
constexpr double kShiftFast = 10.0;       // losses over which the faster level forgets
constexpr double kShiftWander = 8.0;      // times what that wanders above the level, counted as spread at least
constexpr double kShiftSlower = 4.0;      // horizons over which the wandering is forgotten
constexpr double kShiftFaint = 0.25;      // of its level: a gradient below it is one from which little is learnt
constexpr double kShiftFaintness = 1.0;   // what that adds to a loss above the level
constexpr double kShiftSuspicion = 0.15;  // of the threshold: from here on nothing is learnt and nothing promoted
constexpr double kShiftBelowZero = 0.5;   // of its pace: how a level below zero follows even then
constexpr double kShiftArmed = 80.0;      // losses for which a spike of the gradient makes the test keener
constexpr double kShiftKeener = 3.0;      // by which its threshold is then divided; its slack is 0
constexpr int kCaptureParts = 2;      // 0: what others mutate, on the current stream; 1: parameters and optimizer state
constexpr int kAllPartsDone = (1 << kCaptureParts) - 1;

}  // namespace tolaria::math

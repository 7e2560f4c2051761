// How large each tensor of the state is, and which one no promoted capture would have led anybody to expect (DESIGN 4, "what
// the loss never shows"). A capture reads every byte anyway; the largest |value| of a tensor is known when it is done.
//
// tolaria/reference/magnitude.py says the same in PyTorch and is the oracle, bit for bit.
#pragma once

#include <c10/macros/Macros.h>

#include <cstdint>

#include "math/governor_state.h"

namespace tolaria::math {

constexpr double kHistoryCaptures = 3.0;   // promoted captures of a tensor before it is judged
constexpr double kUnexpected = 1000.0;     // times its largest magnitude in those is suspicious
constexpr double kExpected = 2.0;          // so many times are above suspicion again: a running average heals slowly
constexpr double kLeastMagnitude = 1e-3;   // what counts in place of less: zero-born tensors grow by any factor
// What has settled is trusted, since it is no accident: no capture was below kFallen of the lowest, or above kGrown times the
// highest since the suspicion began. What swings between the two settles, what heals or explodes does not.
constexpr double kFallen = 0.9;
constexpr double kGrown = 2.0;
constexpr double kSettledIntervals = 5.0;  // intervals between captures, for so long
constexpr double kSuspectedAgain = 3.0;    // captures, where each was undone

// What is known of one tensor. It begins anew with another tensor, whose `birth` is another.
struct MagnitudeHistory {
  double slot[2];   // in the captures of the slots; -1: not captured
  double largest;   // in promoted captures, `folded` the last of them: that of the other slot joins at the next capture
  double promoted;  // how many there were
  double folded;
  double suspected;  // suspicious captures since step `since`, when it was lower or higher than ever
  double low, high;  // since the suspicion began
  double since;
  double rollbacks;  // how many there were when it was last suspicious
  double birth;
  unsigned long long now;  // scratch of the capture: the largest of the rows copied so far, as bits; 0 between launches
};
constexpr int64_t kMagnitudeColumns = sizeof(MagnitudeHistory) / sizeof(double);

// The tensor that is under suspicion for the shortest time, so the last to be trusted; then the one of the lowest index.
struct Suspect {
  double tensor = -1.0;  // none
  double since = 0.0;
  double times = 0.0;
};

C10_HOST_DEVICE inline Suspect later_of(const Suspect& a, const Suspect& b) {
  if (!(b.tensor >= 0.0)) return a;
  if (!(a.tensor >= 0.0) || b.since > a.since) return b;
  return b.since == a.since && b.tensor < a.tensor ? b : a;
}

// Counts the capture that is the last known good one, which is not the one being made, into the history.
C10_HOST_DEVICE inline void fold_promoted(const Governor& g, MagnitudeHistory& m, int good) {
  const double capture = g[field::slot_capture_0 + good];
  if (!(m.slot[good] >= 0.0) || m.folded == capture) return;
  if (m.slot[good] > m.largest) m.largest = m.slot[good];
  m.promoted = one_nan(m.promoted + 1.0);
  m.folded = capture;
}

// A capture into `slot` has found the magnitude `now`, infinite where a value is not finite; whether that is suspicious.
C10_HOST_DEVICE inline bool weigh(const Governor& g, MagnitudeHistory& m, double birth, double now, int slot) {
  if (m.birth != birth) m = {{-1.0, -1.0}, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, birth, 0};
  fold_promoted(g, m, 1 - slot);
  m.slot[slot] = now;
  const double rollbacks = g[field::rollback_count];
  const double base = m.largest > kLeastMagnitude ? m.largest : kLeastMagnitude;
  // A rollback has taken away what was under suspicion: what comes then is judged afresh.
  const bool lingers = m.suspected > 0.0 && m.rollbacks == rollbacks;
  const double most = (lingers ? kExpected : kUnexpected) * base;
  if (!(m.promoted >= kHistoryCaptures && now > most)) {
    m.suspected = 0.0;
    return false;
  }
  const bool is_first = !(m.suspected > 0.0), falls = is_first || now < kFallen * m.low;
  const bool grows = is_first || now > kGrown * m.high;
  m.suspected = falls || grows ? 1.0 : one_nan(m.suspected + 1.0);
  if (falls || grows) m.since = g[field::slot_step_0 + slot] > 0.0 ? g[field::slot_step_0 + slot] : 0.0;
  if (falls) m.low = now;
  if (grows) m.high = now;
  m.rollbacks = rollbacks;
  return true;
}

}  // namespace tolaria::math

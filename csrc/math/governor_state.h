// One governor's column of the state: how to reach its fields and memories, and what it tells the host.
#pragma once

#include <c10/macros/Macros.h>

#include <cstdint>

#include "math/governor_fields.h"
#include "math/lanes.h"

namespace tolaria::math {

// A column of `state`; memory 0 is the live one, 1 and 2 are the slots'.
struct Governor {
  using Real = double;
  using Mask = bool;

  double* column;
  int64_t stride;  // from field to field
  int window;
  double* mailbox;  // status words and ring of this governor, or null
  int64_t ring_records;

  C10_HOST_DEVICE double& operator[](int f) const { return column[f * stride]; }
  C10_HOST_DEVICE int memory_size() const { return memory::count + 2 * window; }
  C10_HOST_DEVICE double& recall(int which, int m) const {
    return column[(field::count + which * memory_size() + m) * stride];
  }
  C10_HOST_DEVICE double& live(int m) const { return recall(0, m); }
  // Where the windows of a memory begin.
  C10_HOST_DEVICE int losses() const { return memory::count; }
  C10_HOST_DEVICE int gradients() const { return memory::count + window; }
};

// Whatever bytes a state holds (it may come from a file), a governor never leaves its column and its mailbox row: what
// indexes or counts passes through one of these four. They compare before they cast, since a cast of NaN or of a value
// that does not fit is undefined; the reference has the same four.
C10_HOST_DEVICE inline int slot_index(double slot) { return slot == 0.0 ? 0 : 1; }
C10_HOST_DEVICE inline int entries_in(double size, int window) {
  return size >= window ? window : size > 0.0 ? static_cast<int>(size) : 0;
}
C10_HOST_DEVICE inline int parts_in(double done) {
  return done >= 0.0 && done <= kAllPartsDone ? static_cast<int>(done) : 0;
}
C10_HOST_DEVICE inline int64_t ring_place(double sequence, int64_t records) {
  return sequence >= 0.0 && sequence <= kMaxCount ? static_cast<int64_t>(sequence) % records : 0;
}

// Makes what this thread wrote visible to the host before what it writes next. The words are aligned doubles, each one
// store over the bus, and the fence keeps the compiler from moving them too, so nothing has to be volatile. One thread
// writes a mailbox row at a time: judge, restore and capture of a governor are ordered by the stream or by an event.
C10_HOST_DEVICE inline void publish() {
#ifdef __CUDA_ARCH__
  __threadfence_system();
#endif
}

// Status words. Every store crosses the bus, so each transition writes the words that it changes and no others; and it
// writes them before it counts its event, so that a host which has heard of the event finds them. The rollback count is
// written last: a host that sees it move finds the words that describe that rollback.

// The words of a verdict that stay the same over clean steps.
struct VerdictWords {
  double reason, rollback, tensor_index;
};

C10_HOST_DEVICE inline VerdictWords verdict_words(const Governor& g) {
  return {g[field::reason], g[field::rollback], g[field::tensor_index]};
}

C10_HOST_DEVICE inline void write_verdict_status(const Governor& g, const VerdictWords& before) {
  if (g.mailbox == nullptr) return;
  double* s = g.mailbox;
  const VerdictWords now = verdict_words(g);
  s[status::step] = g[field::step];
  if (now.reason != before.reason) s[status::reason] = now.reason;
  if (now.rollback != before.rollback) s[status::rollback] = now.rollback;
  if (now.tensor_index != before.tensor_index) s[status::tensor_index] = now.tensor_index;
}

C10_HOST_DEVICE inline void write_slot_status(const Governor& g) {
  if (g.mailbox == nullptr) return;
  double* s = g.mailbox;
  const int good = slot_index(g[field::last_good]);
  s[status::last_good_capture] = g[field::slot_capture_0 + good];
  s[status::last_good_step] = g[field::slot_step_0 + good];
  s[status::last_good_ticket] = g[field::slot_ticket_0 + good];
  s[status::capture_count] = g[field::capture_count];
  s[status::promotion_count] = g[field::promotion_count];
  s[status::due_from] = g[field::due_from];
}

C10_HOST_DEVICE inline void write_rollback_status(const Governor& g) {
  if (g.mailbox == nullptr) return;
  double* s = g.mailbox;
  s[status::restored_capture] = g[field::restored_capture];
  s[status::restored_step] = g[field::restored_step];
  s[status::restored_ticket] = g[field::restored_ticket];
  s[status::due_from] = g[field::due_from];
  publish();
  s[status::rollback_count] = g[field::rollback_count];
}

// All of them, whatever they were.
C10_HOST_DEVICE inline void write_status(const Governor& g) {
  if (g.mailbox == nullptr) return;
  double* s = g.mailbox;
  s[status::step] = g[field::step];
  s[status::reason] = g[field::reason];
  s[status::rollback] = g[field::rollback];
  s[status::tensor_index] = g[field::tensor_index];
  write_slot_status(g);
  write_rollback_status(g);
}

C10_HOST_DEVICE inline void write_record(const Governor& g, double sequence, EventKind kind, double capture_id,
                                         double capture_step, double ticket) {
  double* r = g.mailbox + status::count + ring_place(sequence, g.ring_records) * record::count;
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
  r[record::gradient_norm] = g[field::gradient_norm];
  r[record::gradient_threshold] = g[field::gradient_threshold];
  r[record::drift] = g[field::drift];
  r[record::panics] = g[field::panics];
  r[record::tensor_index] = g[field::tensor_index];
  r[record::capture_id] = capture_id;
  r[record::capture_step] = capture_step;
  r[record::steps_lost] = g[field::steps_lost];
  r[record::rollback_count] = g[field::rollback_count];
  r[record::ticket] = ticket;
}

// Appends one record to the ring, if there is one; the count of records is written after the record itself.
C10_HOST_DEVICE inline void emit(const Governor& g, EventKind kind, double capture_id, double capture_step,
                                 double ticket) {
  const double sequence = g[field::events], following = one_nan(sequence + 1.0);
  g[field::events] = following;
  if (g.mailbox == nullptr) return;
  if (g.ring_records > 0) write_record(g, sequence, kind, capture_id, capture_step, ticket);
  publish();
  g.mailbox[status::events] = following;
}

C10_HOST_DEVICE inline void copy_memory(const Governor& g, int to, int from) {
  for (int m = 0; m < g.memory_size(); ++m) g.recall(to, m) = g.recall(from, m);
}

C10_HOST_DEVICE inline void clear_memory(const Governor& g, int which) {
  for (int m = 0; m < g.memory_size(); ++m) g.recall(which, m) = 0.0;
}

}  // namespace tolaria::math

// tolaria::snapshot_capture_ and snapshot_restore_ on the CPU: one pass over the bytes of any number of tensors.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <vector>

#include "common/governor_batch.h"
#include "common/snapshot_table.h"
#include "cpu/isa.h"
#include "cpu/stream.h"
#include "ops.h"

namespace tolaria {
namespace {

constexpr int64_t kAlign = 64;
constexpr int64_t kTaskBytes = 1 << 18;  // bytes per task: about 30 us of copying, ten times a task hand-over

// Copies a run and returns the largest of its words without their signs (as signed integers, of which every instruction set
// has a maximum). A state of 140 MB took 0.7 times as long streamed (Zen 3, two cores), and the caches keep what the training
// step had there.
template <typename word_t>
struct WeighingCopy {
  static TOLARIA_INLINE uint64_t run(char* target, const char* source, int64_t bytes, bool streams) {
    constexpr int64_t kWords = cpu::kLine / sizeof(word_t);
    word_t largest[kWords] = {};
    int64_t at = 0;
    if (streams && cpu::is_streamable(target)) {
      for (; at + cpu::kLine <= bytes; at += cpu::kLine) {
        cpu::prefetch(source + at + cpu::kStreamAhead);
        look(largest, source + at, kWords);
        cpu::stream_line(target + at, source + at);
      }
      cpu::stream_fence();
    }
    for (; at + cpu::kLine <= bytes; at += cpu::kLine) {
      look(largest, source + at, kWords);
      std::memcpy(target + at, source + at, cpu::kLine);
    }
    std::memcpy(target + at, source + at, bytes - at);
    look(largest, source + at, (bytes - at) / sizeof(word_t));
    return static_cast<uint64_t>(*std::max_element(largest, largest + kWords));
  }

  static TOLARIA_INLINE void look(word_t* largest, const char* source, int64_t words) {
    for (int64_t i = 0; i < words; ++i) {
      word_t word;  // not a copy of the line: its narrow stores would hold up the wide loads
      std::memcpy(&word, source + i * sizeof(word_t), sizeof(word_t));
      word &= std::numeric_limits<word_t>::max();
      largest[i] = word > largest[i] ? word : largest[i];
    }
  }
};

// How a pass copies: past the caches where it moves more than they should hold.
struct Copier {
  bool streams;

  explicit Copier(const SnapshotRow* rows, int64_t begin, int64_t end) {
    int64_t bytes = 0;
    for (int64_t r = begin; r < end; ++r) bytes += rows[r].bytes;
    streams = cpu::outgrows_caches(2 * bytes);
  }

  void copy(char* target, const char* source, int64_t bytes) const {
    streams ? cpu::stream_run(target, source, bytes) : cpu::plain_run(target, source, bytes);
  }

  // The largest magnitude that was copied, if `check` says what the bytes are; infinity where something is not finite.
  double copy_weighed(char* target, const char* source, int64_t bytes, int64_t check) const {
    const auto largest = [&]() -> uint64_t {
      switch (check) {
        case kCheckFloat: return cpu::vectorised<WeighingCopy<int32_t>>(target, source, bytes, streams);
        case kCheckDouble: return cpu::vectorised<WeighingCopy<int64_t>>(target, source, bytes, streams);
        case kCheckHalf:
        case kCheckBFloat16: return cpu::vectorised<WeighingCopy<int16_t>>(target, source, bytes, streams);
        case kCheckFloat8E4M3:
        case kCheckFloat8E5M2: return cpu::vectorised<WeighingCopy<int8_t>>(target, source, bytes, streams);
        default: copy(target, source, bytes); return 0;
      }
    };
    return LargestValue{largest(), check}.magnitude();
  }
};

SnapshotTable checked_table(const at::Tensor& table) {
  const SnapshotTable view = snapshot_table(table);
  const int64_t first = view.header->part0_rows, rows = view.header->rows;
  TORCH_CHECK_VALUE(0 <= first && first <= rows && rows <= view.capacity && view.header->elsewhere == 0,
                    "table: header says ", first, " and ", rows, " rows, the matrix holds ", view.capacity);
  return view;
}

// Calls task(row, offset, bytes) over all bytes of rows [begin, end), cut where a row or a thread's share ends.
template <typename Task>
void for_each_piece(const SnapshotRow* rows, int64_t begin, int64_t end, const Task& task) {
  // Rows are laid out at multiples of kAlign, so that no cut between tasks falls inside an element.
  std::vector<int64_t> offsets(end - begin + 1, 0);
  for (int64_t r = begin; r < end; ++r) {
    offsets[r - begin + 1] = offsets[r - begin] + (rows[r].bytes + kAlign - 1) / kAlign * kAlign;
  }
  const int64_t total = offsets.back();
  const auto run = [&](int64_t from, int64_t to) {
    int64_t r = std::upper_bound(offsets.begin(), offsets.end(), from) - offsets.begin() - 1;
    while (from < to) {
      const int64_t stop = std::min(to, offsets[r] + rows[begin + r].bytes);
      if (from < stop) task(rows[begin + r], from - offsets[r], stop - from);
      from = std::min(to, offsets[++r]);
    }
  };
  if (total <= kTaskBytes) return run(0, total);
  const int64_t tasks = (total + kTaskBytes - 1) / kTaskBytes;
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    run(first * kTaskBytes, std::min(total, last * kTaskBytes));
  });
}

// Raises or lowers what several threads share to `value`, which is reached whatever their order.
template <typename T, typename Precedes>
void move_to(T& shared, T value, const Precedes& precedes) {
  const std::atomic_ref<T> reached(shared);
  T seen = reached.load(std::memory_order_relaxed);
  while (precedes(value, seen) && !reached.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

template <typename T>
T* address(int64_t base, int64_t offset) {
  return reinterpret_cast<T*>(base + offset);
}

}  // namespace

void snapshot_capture_cpu(at::Tensor& state, int64_t column, const at::Tensor& table, int64_t part,
                          const std::optional<at::Tensor>& mailbox, int64_t ticket, bool /* aside: one memory, one way */) {
  const math::Governor g = governor_at(state, column, mailbox);
  check_snapshot_table(state, table);
  TORCH_CHECK_VALUE(part >= 0 && part < math::kCaptureParts, "part: expected 0 or 1, got ", part);
  const double order = g[math::field::capture_order_0 + static_cast<int>(part)];
  if (!(order >= 0.0)) return;  // -1, or NaN
  const int slot = math::slot_index(order);
  const SnapshotTable t = checked_table(table);
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  int64_t first_bad = kNone;
  math::Suspect suspect;
  std::mutex suspecting;
  const auto weigh = [&](const SnapshotRow& row) {
    const math::Suspect found = t.weigh(g, row, slot);
    if (!(found.tensor >= 0.0)) return;
    const std::lock_guard<std::mutex> lock(suspecting);
    suspect = math::later_of(suspect, found);
  };
  // A tensor of one row that one task copies, as most are, is weighed there and then; the others when all tasks are done.
  std::vector<char> is_weighed(t.end(part) - t.begin(part), 0);
  const Copier copier(t.rows, t.begin(part), t.end(part));
  for_each_piece(t.rows, t.begin(part), t.end(part), [&](const SnapshotRow& row, int64_t offset, int64_t bytes) {
    if (row.check == kZeroed) {
      std::memset(address<char>(row.slot[slot], offset), 0, bytes);
      return;
    }
    const double largest = copier.copy_weighed(address<char>(row.slot[slot], offset),
                                               address<const char>(row.live, offset), bytes, row.check);
    if (std::isinf(largest)) move_to(first_bad, row.tensor, std::less<>());
    math::MagnitudeHistory* m = t.magnitude_of(row);
    if (m == nullptr) return;
    const auto bits = std::bit_cast<unsigned long long>(largest);
    if (bytes == row.bytes && t.is_alone(row, part)) {
      m->now = bits;
      weigh(row);
      is_weighed[&row - t.rows - t.begin(part)] = 1;
    } else {
      move_to(m->now, bits, std::greater<>());
    }
  });
  for (int64_t r = t.begin(part); r < t.end(part); ++r) {
    if (!is_weighed[r - t.begin(part)]) weigh(t.rows[r]);
  }
  math::finish_capture_part(g, static_cast<int>(part), first_bad == kNone ? -1.0 : static_cast<double>(first_bad), suspect,
                            static_cast<double>(ticket));
}

void snapshot_restore_cpu(at::Tensor& state, int64_t column, const at::Tensor& config, const at::Tensor& table,
                          const std::optional<at::Tensor>& mailbox) {
  const math::Governor g = governor_at(state, column, mailbox);
  check_governor_config(state, config);
  check_snapshot_table(state, table);
  if (g[math::field::restore_order] == 0.0) return;
  const int slot = math::slot_index(g[math::field::last_good]);
  const SnapshotTable t = checked_table(table);
  const Copier copier(t.rows, 0, t.end(1));
  for_each_piece(t.rows, 0, t.end(1), [&](const SnapshotRow& row, int64_t offset, int64_t bytes) {
    copier.copy(address<char>(row.live, offset), address<const char>(row.slot[slot], offset), bytes);
  });
  math::commit_rollback(g, config.const_data_ptr<double>());
}

}  // namespace tolaria

// The table of captured memory: which bytes go where. An int64 matrix of kTableColumns, on the device of the state.
//
// The first two rows are a header; rows of part 0 come first, then those of part 1. Each row is a contiguous run of bytes,
// so dtype and shape do not matter to a copy; `check` says how to read the values on the way, of which the largest is sought.
// Non-finite ones are larger than all others; where a row has a `birth`, the tensor's magnitude is judged. A CUDA graph keeps
// the matrix's address. The number of rows is read on the device and may change; where they outgrow the matrix, they lie
// elsewhere and the header says where.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/macros/Macros.h>
#include <c10/util/Exception.h>

#include <bit>
#include <cstdint>
#include <limits>

#include "common/largest_value.h"
#include "math/magnitude.h"

namespace tolaria {

struct SnapshotHeader {
  int64_t part0_rows;
  int64_t rows;
  // Scratch of the CUDA kernels, 0 and kNoTensor between launches: blocks that are done, first non-finite tensor.
  unsigned long long blocks_done[2];
  unsigned long long first_bad[2];
  int64_t elsewhere;  // address of the rows, or 0: right behind the header
  int64_t room;       // for so many, elsewhere
  int64_t magnitudes;      // address of the magnitudes, one for each index of a tensor; 0: none are judged
  int64_t magnitude_room;  // for so many
  int64_t unused[4];
};

struct SnapshotRow {
  int64_t live;     // address of the live bytes
  int64_t slot[2];  // addresses in the two slots
  int64_t bytes;
  int64_t check;    // CheckKind
  int64_t tensor;   // index of the tensor this run belongs to, for reports
  int64_t birth;    // of that tensor, if its magnitude is judged; negative in all its rows but the first; else 0
};
constexpr int64_t kTableColumns = sizeof(SnapshotRow) / sizeof(int64_t);
constexpr int64_t kHeaderRows = 2;
static_assert(sizeof(SnapshotHeader) == kHeaderRows * sizeof(SnapshotRow), "the header fills the first rows");

C10_HOST_DEVICE inline const SnapshotRow* rows_of(const SnapshotHeader* header) {
  return header->elsewhere != 0 ? reinterpret_cast<const SnapshotRow*>(header->elsewhere)
                                : reinterpret_cast<const SnapshotRow*>(header + 1);
}

constexpr unsigned long long kNoTensor = std::numeric_limits<int64_t>::max();

// Whatever the header says, no row outside the matrix is read. What the rows say (addresses, bytes) nobody can check.
struct SnapshotTable {
  const SnapshotHeader* header;
  const SnapshotRow* rows;
  int64_t capacity;
  C10_HOST_DEVICE int64_t begin(int part) const { return part == 0 ? 0 : bounded(header->part0_rows, end(1)); }
  C10_HOST_DEVICE int64_t end(int part) const { return part == 0 ? begin(1) : bounded(header->rows, capacity); }

  // Where what is known of a row's tensor is kept; null if its magnitude is not judged.
  C10_HOST_DEVICE math::MagnitudeHistory* magnitude_of(const SnapshotRow& row) const {
    const bool is_judged = row.birth != 0 && row.tensor >= 0 && row.tensor < header->magnitude_room;
    return is_judged ? reinterpret_cast<math::MagnitudeHistory*>(header->magnitudes) + row.tensor : nullptr;
  }
  // Whether a row of a judged tensor is all of it.
  C10_HOST_DEVICE bool is_alone(const SnapshotRow& row, int part) const {
    const SnapshotRow* next = &row + 1;
    return row.birth > 0 && (next == rows + end(part) || next->birth >= 0);
  }
  // Judges the tensor whose first row this is, once all its rows are copied into `slot`.
  C10_HOST_DEVICE math::Suspect weigh(const math::Governor& g, const SnapshotRow& row, int slot) const {
    math::MagnitudeHistory* m = row.birth > 0 ? magnitude_of(row) : nullptr;
    if (m == nullptr) return {};
    const auto now = std::bit_cast<double>(m->now);
    m->now = 0;
    const bool is_suspicious = math::weigh(g, *m, static_cast<double>(row.birth), now, slot);
    return is_suspicious ? math::Suspect{static_cast<double>(row.tensor), m->since > 0.0 ? m->since : 0.0, m->suspected}
                         : math::Suspect{};
  }

 private:
  C10_HOST_DEVICE static int64_t bounded(int64_t rows, int64_t most) {
    return rows < 0 ? 0 : rows < most ? rows : most;
  }
};

// The table behind `header`, whose matrix has `capacity` rows; where the header can be read.
C10_HOST_DEVICE inline SnapshotTable table_at(const SnapshotHeader* header, int64_t capacity) {
  return {header, rows_of(header), header->elsewhere != 0 ? header->room : capacity};
}

inline SnapshotTable snapshot_table(const at::Tensor& table) {
  const auto* header = reinterpret_cast<const SnapshotHeader*>(table.const_data_ptr<int64_t>());
  return table_at(header, table.size(0) - kHeaderRows);
}

inline void check_snapshot_table(const at::Tensor& state, const at::Tensor& table) {
  TORCH_CHECK_VALUE(table.scalar_type() == at::kLong && table.dim() == 2 && table.is_contiguous() &&
                        table.size(1) == kTableColumns && table.size(0) >= kHeaderRows,
                    "table: expected a contiguous int64 matrix of ", kTableColumns,
                    " columns made by tolaria.ops.SnapshotTable, got ", table.scalar_type(), " of shape ",
                    table.sizes());
  TORCH_CHECK_VALUE(table.device() == state.device(), "table: expected on ", state.device(), " like state, got ",
                    table.device());
  check_span("table", table, table.numel());
}

}  // namespace tolaria

// The table of captured memory: which bytes go where. An int64 matrix of kTableColumns, on the device of the state.
//
// Row 0 is a header: [rows of part 0, rows in all]. Rows of part 0 come first. Each row is a contiguous run of bytes, so
// dtype and shape do not matter to a copy; `check` says how to look for non-finite values on the way.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>

namespace tolaria {

struct SnapshotRow {
  int64_t live;     // address of the live bytes
  int64_t slot[2];  // addresses in the two slots; 0 in a row that is zeroed at a restore and never captured
  int64_t bytes;
  int64_t check;    // CheckKind
  int64_t tensor;   // index of the tensor this run belongs to, for reports
};
constexpr int64_t kTableColumns = sizeof(SnapshotRow) / sizeof(int64_t);

enum CheckKind : int64_t { kCheckNone = 0, kCheckFloat = 1, kCheckDouble = 2, kCheckHalf = 3, kCheckBFloat16 = 4 };

struct SnapshotTable {
  const int64_t* header;
  const SnapshotRow* rows;
  int64_t begin(int part) const { return part == 0 ? 0 : header[0]; }
  int64_t end(int part) const { return part == 0 ? header[0] : header[1]; }
};

inline void check_snapshot_table(const at::Tensor& state, const at::Tensor& table) {
  TORCH_CHECK_VALUE(table.scalar_type() == at::kLong && table.dim() == 2 && table.is_contiguous() &&
                        table.size(1) == kTableColumns && table.size(0) >= 1,
                    "table: expected a contiguous int64 matrix of ", kTableColumns,
                    " columns made by tolaria.ops.SnapshotTable, got ", table.scalar_type(), " of shape ",
                    table.sizes());
  TORCH_CHECK_VALUE(table.device() == state.device(), "table: expected on ", state.device(), " like state, got ",
                    table.device());
}

}  // namespace tolaria

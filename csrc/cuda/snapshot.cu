// tolaria::snapshot_capture_ and snapshot_restore_ on CUDA: one launch for any number of tensors.
//
// Every block reads the order first and returns at once if there is none, so the host can enqueue the same work at every
// step without knowing. Blocks take rows of the table in turn; the last block to finish does the bookkeeping. Orders are
// only cleared there, when every block has read them.
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "common/governor_batch.h"
#include "common/snapshot_table.h"
#include "cuda/last_block.cuh"
#include "cuda/launch.cuh"
#include "ops.h"

namespace tolaria {
namespace {

// On the critical path a copy takes the whole device. Beside training ("aside") it goes at the speed of the bus, which a
// few small blocks saturate: 16 blocks of 128 threads with four loads of 16 bytes each are 128 KiB in flight, and leave
// room for a persistent kernel's block on every multiprocessor.
constexpr int kThreads = cuda::kBlock;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kAsideThreads = 128;
constexpr int kAsideBlocks = 16;
constexpr int kBatch = 4;  // loads in flight per thread

template <typename word_t>
__device__ bool has_nonfinite(word_t word, int64_t check) {
  // Non-finite: every exponent bit set. 16-bit types lie two to a 32-bit word.
  if constexpr (sizeof(word_t) == 2) {
    const unsigned mask = check == kCheckHalf ? 0x7c00u : 0x7f80u;
    return (word & mask) == mask;
  } else if constexpr (sizeof(word_t) == 4) {
    if (check == kCheckFloat) return (word & 0x7f800000u) == 0x7f800000u;
    const unsigned mask = check == kCheckHalf ? 0x7c00u : 0x7f80u;
    return (word & mask) == mask || ((word >> 16) & mask) == mask;
  } else {
    return (word & 0x7ff0000000000000ull) == 0x7ff0000000000000ull;
  }
}

__device__ bool has_nonfinite(uint4 v, int64_t check) {
  if (check == kCheckDouble) {  // the exponent is in the high word of each pair
    return (v.y & 0x7ff00000u) == 0x7ff00000u || (v.w & 0x7ff00000u) == 0x7ff00000u;
  }
  return has_nonfinite(v.x, check) || has_nonfinite(v.y, check) || has_nonfinite(v.z, check) ||
         has_nonfinite(v.w, check);
}

// One row by one block, word by word; true if a thread met a non-finite value. `words` counts word_t. A batch is loaded
// whole before any of it is stored: the compiler may not move a load over a store that could go to the same place.
template <int kBlockThreads, typename word_t>
__device__ bool copy_words(char* __restrict__ target, const char* __restrict__ source, int64_t words, int64_t check) {
  bool bad = false;
  auto* __restrict__ to = reinterpret_cast<word_t*>(target);
  const auto* __restrict__ from = reinterpret_cast<const word_t*>(source);
  const auto store = [&](int64_t i, word_t word) {
    to[i] = word;
    if constexpr (sizeof(word_t) >= 2) {
      if (check != kCheckNone) bad |= has_nonfinite(word, check);
    }
  };
  int64_t i = threadIdx.x;
  for (; i + (kBatch - 1) * kBlockThreads < words; i += kBatch * kBlockThreads) {
    word_t batch[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) batch[k] = from[i + k * kBlockThreads];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) store(i + k * kBlockThreads, batch[k]);
  }
  for (; i < words; i += kBlockThreads) store(i, from[i]);
  return bad;
}

// Width of the widest access that both addresses allow.
__device__ int alignment(const void* a, const void* b) {
  const auto bits = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1;
}

// The widest words first, then narrower ones for what is left. A searched row is whole elements at addresses aligned to
// them, so no word is narrower than an element; bytes only occur where nothing is searched.
template <int kBlockThreads>
__device__ bool copy_bytes(char* target, const char* source, int64_t bytes, int64_t check) {
  const int width = alignment(target, source);
  int64_t done = 0;
  bool bad = false;
  const auto advance = [&](auto word, bool fits) {
    using word_t = decltype(word);
    if (!fits) return;
    const int64_t words = (bytes - done) / static_cast<int64_t>(sizeof(word_t));
    bad |= copy_words<kBlockThreads, word_t>(target + done, source + done, words, check);
    done += words * static_cast<int64_t>(sizeof(word_t));
  };
  advance(uint4{}, width >= 16);
  if (check == kCheckDouble) {
    advance(0ull, width >= 8);
    return bad;
  }
  advance(0u, width >= 4);
  advance(static_cast<unsigned short>(0), width >= 2);
  advance(static_cast<unsigned char>(0), true);
  return bad;
}

__device__ void zero_bytes(char* target, int64_t bytes) {
  for (int64_t i = threadIdx.x; i < bytes; i += blockDim.x) target[i] = 0;
}

// The last block has seen the count of all others, each behind its threads' reads of the order and writes. So no block is
// left that reads the order or the header, which it changes by plain stores: the next launch that reads them is ordered
// behind this one. One counter a part, since part 1 runs on the side stream beside others; part 0 and the restore share
// one, being in order on the stream that judges.
template <int kBlockThreads>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerMultiprocessor)
    snapshot_capture_kernel(math::Governor g, SnapshotHeader* header, int64_t capacity, int part, double ticket) {
  const double order = g[math::field::capture_order_0 + part];
  if (!(order >= 0.0)) return;  // -1, or NaN
  const int slot = math::slot_index(order);
  const SnapshotTable table = table_at(header, capacity);
  const int64_t end = table.end(part);
  for (int64_t r = table.begin(part) + blockIdx.x; r < end; r += gridDim.x) {
    // By reference: a copy in registers cannot be indexed by `slot` and would go to local memory.
    const SnapshotRow& row = table.rows[r];
    auto* target = reinterpret_cast<char*>(row.slot[slot]);
    bool bad = false;
    if (row.check == kZeroed) {
      zero_bytes(target, row.bytes);
    } else {
      bad = copy_bytes<kBlockThreads>(target, reinterpret_cast<const char*>(row.live), row.bytes, row.check);
    }
    if (__syncthreads_or(bad) && threadIdx.x == 0) {
      atomicMin(&header->first_bad[part], static_cast<unsigned long long>(row.tensor));
    }
  }
  if (cuda::is_last_block(&header->blocks_done[part], gridDim.x) && threadIdx.x == 0) {
    const unsigned long long bad = atomicExch(&header->first_bad[part], kNoTensor);
    header->blocks_done[part] = 0;
    math::finish_capture_part(g, part, bad == kNoTensor ? -1.0 : static_cast<double>(bad), ticket);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    snapshot_restore_kernel(math::Governor g, const double* config, SnapshotHeader* header, int64_t capacity) {
  if (g[math::field::restore_order] == 0.0) return;
  const int slot = math::slot_index(g[math::field::last_good]);
  const SnapshotTable table = table_at(header, capacity);
  const int64_t end = table.end(1);
  for (int64_t r = blockIdx.x; r < end; r += gridDim.x) {
    const SnapshotRow& row = table.rows[r];
    copy_bytes<kThreads>(reinterpret_cast<char*>(row.live), reinterpret_cast<const char*>(row.slot[slot]), row.bytes,
                         kCheckNone);
  }
  if (cuda::is_last_block(&header->blocks_done[0], gridDim.x) && threadIdx.x == 0) {
    header->blocks_done[0] = 0;
    math::commit_rollback(g, config);
  }
}

// Rows are split when the table is made, so that one is a fair share for a block. How many there are is read on the device.
unsigned blocks_for(int64_t capacity, int limit) {
  return static_cast<unsigned>(std::clamp<int64_t>(capacity, 1, limit));
}

int whole_device() { return cuda::multiprocessors() * kBlocksPerMultiprocessor; }

SnapshotHeader* header_of(const at::Tensor& table) {
  return reinterpret_cast<SnapshotHeader*>(const_cast<int64_t*>(table.const_data_ptr<int64_t>()));
}

}  // namespace

void snapshot_capture_cuda(at::Tensor& state, int64_t column, const at::Tensor& table, int64_t part,
                           const std::optional<at::Tensor>& mailbox, int64_t ticket, bool aside) {
  const c10::cuda::CUDAGuard guard(state.device());
  const math::Governor g = governor_at(state, column, mailbox);
  check_snapshot_table(state, table);
  TORCH_CHECK_VALUE(part >= 0 && part < math::kCaptureParts, "part: expected 0 or 1, got ", part);
  const int64_t capacity = table.size(0) - kHeaderRows;
  const int copied = static_cast<int>(part);
  const auto number = static_cast<double>(ticket);
  if (aside) {
    TOLARIA_LAUNCH(snapshot_capture_kernel<kAsideThreads>, blocks_for(capacity, kAsideBlocks), kAsideThreads, g,
                   header_of(table), capacity, copied, number);
  } else {
    TOLARIA_LAUNCH(snapshot_capture_kernel<kThreads>, blocks_for(capacity, whole_device()), kThreads, g,
                   header_of(table), capacity, copied, number);
  }
}

void snapshot_restore_cuda(at::Tensor& state, int64_t column, const at::Tensor& config, const at::Tensor& table,
                           const std::optional<at::Tensor>& mailbox) {
  const c10::cuda::CUDAGuard guard(state.device());
  const math::Governor g = governor_at(state, column, mailbox);
  check_governor_config(state, config);
  check_snapshot_table(state, table);
  const int64_t capacity = table.size(0) - kHeaderRows;
  TOLARIA_LAUNCH(snapshot_restore_kernel, blocks_for(capacity, whole_device()), kThreads, g,
                 config.const_data_ptr<double>(), header_of(table), capacity);
}

}  // namespace tolaria

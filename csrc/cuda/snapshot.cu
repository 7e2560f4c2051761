// tolaria::snapshot_capture_ and snapshot_restore_ on CUDA: one launch for any number of tensors.
//
// Every block reads the order first and returns at once if there is none, so the host can enqueue the same work at every
// step without knowing. Blocks take rows of the table in turn; the last block to finish does the bookkeeping. Orders are
// only cleared there, when every block has read them.
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <bit>

#include "common/governor_batch.h"
#include "common/snapshot_table.h"
#include "cuda/last_block.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
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

// The largest values that a thread has seen, without their signs: of doubles, or of narrower ones, several to a word.
struct Largest {
  unsigned long long wide;
  unsigned narrow;
};

__device__ void raise(Largest& largest, unsigned char word, int64_t check) {
  if (check != kCheckNone) largest.narrow = max(largest.narrow, word & 0x7fu);
}

__device__ void raise(Largest& largest, unsigned short word, int64_t check) {
  if (check == kCheckHalf || check == kCheckBFloat16) {
    largest.narrow = max(largest.narrow, word & 0x7fffu);
  } else {
    raise(largest, static_cast<unsigned char>(word), check);
    raise(largest, static_cast<unsigned char>(word >> 8), check);
  }
}

__device__ void raise(Largest& largest, unsigned word, int64_t check) {
  if (check == kCheckFloat) {
    largest.narrow = max(largest.narrow, word & 0x7fffffffu);
  } else {
    raise(largest, static_cast<unsigned short>(word), check);
    raise(largest, static_cast<unsigned short>(word >> 16), check);
  }
}

__device__ void raise(Largest& largest, unsigned long long word, int64_t) {
  largest.wide = max(largest.wide, word & 0x7fffffffffffffffull);
}

__device__ void raise(Largest& largest, uint4 v, int64_t check) {
  if (check == kCheckDouble) {
    raise(largest, static_cast<unsigned long long>(v.y) << 32 | v.x, check);
    raise(largest, static_cast<unsigned long long>(v.w) << 32 | v.z, check);
    return;
  }
  raise(largest, v.x, check);
  raise(largest, v.y, check);
  raise(largest, v.z, check);
  raise(largest, v.w, check);
}

// One row by one block, word by word. `words` counts word_t. A batch is loaded whole before any of it is stored: the compiler
// may not move a load over a store that could go to the same place.
template <int kBlockThreads, typename word_t>
__device__ void copy_words(char* __restrict__ target, const char* __restrict__ source, int64_t words, int64_t check,
                           Largest& largest) {
  auto* __restrict__ to = reinterpret_cast<word_t*>(target);
  const auto* __restrict__ from = reinterpret_cast<const word_t*>(source);
  const auto store = [&](int64_t i, word_t word) {
    to[i] = word;
    if (check != kCheckNone) raise(largest, word, check);
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
}

// Width of the widest access that both addresses allow.
__device__ int alignment(const void* a, const void* b) {
  const auto bits = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1;
}

// The widest words first, then narrower ones for what is left. A searched row is whole elements at addresses aligned to
// them, so no word is narrower than an element. Returns the largest values that this thread has copied.
template <int kBlockThreads>
__device__ Largest copy_bytes(char* target, const char* source, int64_t bytes, int64_t check) {
  const int width = alignment(target, source);
  int64_t done = 0;
  Largest largest{0, 0};
  const auto advance = [&](auto word, bool fits) {
    using word_t = decltype(word);
    if (!fits) return;
    const int64_t words = (bytes - done) / static_cast<int64_t>(sizeof(word_t));
    copy_words<kBlockThreads, word_t>(target + done, source + done, words, check, largest);
    done += words * static_cast<int64_t>(sizeof(word_t));
  };
  advance(uint4{}, width >= 16);
  if (check == kCheckDouble) {
    advance(0ull, width >= 8);
    return largest;
  }
  advance(0u, width >= 4);
  advance(static_cast<unsigned short>(0), width >= 2);
  advance(static_cast<unsigned char>(0), true);
  return largest;
}

// The largest magnitude that a warp's threads have copied, in all of them; infinity where something is not finite.
__device__ double warp_largest(const Largest& own, int64_t check) {
  unsigned long long bits = check == kCheckDouble ? own.wide : own.narrow;
#pragma unroll
  for (int offset = cuda::kWarp / 2; offset > 0; offset /= 2) {
    bits = max(bits, __shfl_xor_sync(cuda::kAllLanes, bits, offset));
  }
  return LargestValue{bits, check}.magnitude();
}

// What a warp has found of a row: of a maximum the order does not matter, so that it is the same every time.
__device__ void note(SnapshotHeader* header, const SnapshotTable& table, int part, const SnapshotRow& row, double largest) {
  if (isinf(largest)) atomicMin(&header->first_bad[part], static_cast<unsigned long long>(row.tensor));
  math::MagnitudeHistory* m = table.magnitude_of(row);
  if (m != nullptr) atomicMax(&m->now, std::bit_cast<unsigned long long>(largest));
}

// Judges the tensors of a part, all threads of the one block that is left; the result is for thread 0.
template <int kBlockThreads>
__device__ math::Suspect weigh_part(const math::Governor& g, const SnapshotTable& table, int part, int slot) {
  math::Suspect suspect;
  for (int64_t r = table.begin(part) + threadIdx.x; r < table.end(part); r += kBlockThreads) {
    suspect = math::later_of(suspect, table.weigh(g, table.rows[r], slot));
  }
  if (!__syncthreads_or(suspect.tensor >= 0.0)) return suspect;
  __shared__ double found[kBlockThreads][3];
  double* own = found[threadIdx.x];
  own[0] = suspect.tensor, own[1] = suspect.since, own[2] = suspect.times;
  __syncthreads();
  for (int i = 0; threadIdx.x == 0 && i < kBlockThreads; ++i) {
    suspect = math::later_of(suspect, {found[i][0], found[i][1], found[i][2]});
  }
  return suspect;
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
    if (row.check == kZeroed) {
      zero_bytes(target, row.bytes);
      continue;
    }
    const Largest own = copy_bytes<kBlockThreads>(target, reinterpret_cast<const char*>(row.live), row.bytes, row.check);
    if (row.check == kCheckNone) continue;
    const double largest = warp_largest(own, row.check);
    if (threadIdx.x % cuda::kWarp == 0) note(header, table, part, row, largest);
  }
  if (!cuda::is_last_block(&header->blocks_done[part], gridDim.x)) return;
  const math::Suspect suspect = weigh_part<kBlockThreads>(g, table, part, slot);
  if (threadIdx.x == 0) {
    const unsigned long long bad = atomicExch(&header->first_bad[part], kNoTensor);
    header->blocks_done[part] = 0;
    math::finish_capture_part(g, part, bad == kNoTensor ? -1.0 : static_cast<double>(bad), suspect, ticket);
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

// tensor_stats on CUDA: blocks add up chunks of the list; the last block to finish adds up the blocks, in their order.
#include "math/stats.h"

#include <ATen/ops/empty.h>
#include <vector>

#include "common/stats_checks.h"
#include "cuda/elementwise.cuh"
#include "cuda/multi_tensor.cuh"
#include "cuda/reduce.cuh"
#include "ops.h"

namespace tolaria {
namespace {

using cuda::kBlock;
using cuda::kWarp;
using cuda::TensorTable;
using math::Stats;

constexpr int64_t kNowhere = INT64_MAX;
// Blocks that a multiprocessor is to hold: said, since ptxas otherwise spills to hold one more.
constexpr int kResident = 4;
constexpr int64_t kSector = 32;  // bytes that memory moves at a time

// What a thread, a block or all of them found; `first` is the smallest place of a tensor with a non-finite value.
struct Findings {
  Stats stats;
  int64_t first = kNowhere;

  __device__ void merge(const Findings& other) {
    stats.merge(other.stats);
    first = other.first < first ? other.first : first;
  }
};

__device__ inline Findings warp_merge(Findings found) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    Findings other;
    other.stats.sum_squares = __shfl_down_sync(cuda::kAllLanes, found.stats.sum_squares, offset);
    other.stats.max_abs = __shfl_down_sync(cuda::kAllLanes, found.stats.max_abs, offset);
    other.stats.nonfinite = __shfl_down_sync(cuda::kAllLanes, found.stats.nonfinite, offset);
    other.first = __shfl_down_sync(cuda::kAllLanes, found.first, offset);
    found.merge(other);
  }
  return found;
}

// The findings of all threads, in thread 0. It may be called again after a barrier.
__device__ inline Findings block_merge(Findings found) {
  __shared__ double sums[kBlock / kWarp], peaks[kBlock / kWarp];
  __shared__ int64_t counts[kBlock / kWarp], places[kBlock / kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  found = warp_merge(found);
  if (lane == 0) {
    sums[warp] = found.stats.sum_squares;
    peaks[warp] = found.stats.max_abs;
    counts[warp] = found.stats.nonfinite;
    places[warp] = found.first;
  }
  __syncthreads();
  Findings result;
  if (warp == 0) {
    if (lane < kBlock / kWarp) result = {{sums[lane], peaks[lane], counts[lane]}, places[lane]};
    result = warp_merge(result);
  }
  return result;
}

template <typename scalar_t>
__device__ inline void take_in(scalar_t value, Stats& stats) {
  const double wide = math::finite_or_zero(value), size = wide < 0 ? -wide : wide;
  stats.sum_squares += wide * wide;
  stats.max_abs = stats.max_abs < size ? size : stats.max_abs;
  stats.nonfinite += !math::is_finite(value);
}

// Elements before the first sector, and those that fill no pack at the end, one by one; the rest in packs of 16 bytes.
template <typename scalar_t>
__device__ __forceinline__ Stats chunk_stats(const void* base, int64_t start, int64_t n) {
  constexpr int N = 16 / sizeof(scalar_t);
  const scalar_t* data = static_cast<const scalar_t*>(base) + start;
  const int64_t ahead = -reinterpret_cast<intptr_t>(data) & (kSector - 1);
  const int64_t head = min(n, ahead / static_cast<int64_t>(sizeof(scalar_t))), tail = head + (n - head) / N * N;
  Stats stats;
  if (threadIdx.x < head) take_in(data[threadIdx.x], stats);
  for (int64_t i = head + static_cast<int64_t>(threadIdx.x) * N; i < tail; i += kBlock * N) {
    const auto pack = cuda::load_whole<N>(data + i);
#pragma unroll
    for (int j = 0; j < N; ++j) take_in(pack.value[j], stats);
  }
  if (tail + threadIdx.x < n) take_in(data[tail + threadIdx.x], stats);
  return stats;
}

__device__ __forceinline__ Stats chunk_stats_of(at::ScalarType type, const void* base, int64_t start, int64_t n) {
  switch (type) {
    case at::kFloat: return chunk_stats<float>(base, start, n);
    case at::kDouble: return chunk_stats<double>(base, start, n);
    case at::kHalf: return chunk_stats<c10::Half>(base, start, n);
    case at::kBFloat16: return chunk_stats<c10::BFloat16>(base, start, n);
    case at::kChar: return chunk_stats<int8_t>(base, start, n);
    case at::kShort: return chunk_stats<int16_t>(base, start, n);
    case at::kInt: return chunk_stats<int32_t>(base, start, n);
    case at::kLong: return chunk_stats<int64_t>(base, start, n);
    case at::kUInt16: return chunk_stats<uint16_t>(base, start, n);
    case at::kUInt32: return chunk_stats<uint32_t>(base, start, n);
    case at::kUInt64: return chunk_stats<uint64_t>(base, start, n);
    default: return chunk_stats<uint8_t>(base, start, n);  // uint8 and bool
  }
}

// The blocks of one table write `partial`; the last of all `total` blocks, over all tables, adds up `all` in their order
// and writes `out`.
__global__ void __launch_bounds__(kBlock, kResident)
    stats_kernel(const __grid_constant__ TensorTable table, Findings* partial, const Findings* all, unsigned total,
                 unsigned* finished, double* out) {
  Findings found;
  for (int64_t chunk = blockIdx.x; chunk < table.chunks(); chunk += gridDim.x) {
    const int tensor = table.find(chunk);
    const int64_t before = tensor == 0 ? 0 : table.end[tensor - 1];
    const int64_t start = (chunk - before) * cuda::kChunkElements;
    const int64_t n = min(cuda::kChunkElements, table.size[tensor] - start);
    const auto type = static_cast<at::ScalarType>(table.type[tensor]);
    const Stats stats = chunk_stats_of(type, table.data[tensor], start, n);
    found.merge({stats, stats.nonfinite > 0 ? table.index[tensor] : kNowhere});
  }
  found = block_merge(found);
  if (threadIdx.x == 0) partial[blockIdx.x] = found;
  if (!cuda::is_last_block(finished, total)) return;
  Findings sum;
  for (unsigned i = threadIdx.x; i < total; i += kBlock) {
    const Stats stats{__ldcg(&all[i].stats.sum_squares), __ldcg(&all[i].stats.max_abs), __ldcg(&all[i].stats.nonfinite)};
    sum.merge({stats, __ldcg(&all[i].first)});
  }
  sum = block_merge(sum);
  if (threadIdx.x != 0) return;
  out[math::kSumSquares] = sum.stats.sum_squares;
  out[math::kMaxAbs] = sum.stats.max_abs;
  out[math::kNonfiniteCount] = static_cast<double>(sum.stats.nonfinite);
  out[math::kFirstNonfinite] = sum.first == kNowhere ? -1.0 : static_cast<double>(sum.first);
}

}  // namespace

at::Tensor tensor_stats_cuda(const OptionalTensorList& tensors) {
  std::vector<at::Tensor> flat;  // dense ones as they are, the others copied; kept until the launch
  std::vector<int64_t> places;
  at::Tensor any;
  for_each_checked(tensors, [&](int64_t index, const at::Tensor& tensor) {
    any = tensor;
    if (tensor.numel() == 0) return;
    flat.push_back(tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous());
    places.push_back(index);
  });
  const c10::cuda::CUDAGuard guard(any.device());
  std::vector<TensorTable> tables(1);
  for (size_t i = 0; i < flat.size(); ++i) {
    if (tables.back().is_full()) tables.emplace_back();
    tables.back().add(flat[i], places[i]);
  }
  std::vector<unsigned> grids;
  unsigned total = 0;
  for (const TensorTable& table : tables) {
    grids.push_back(cuda::grid_for(table.chunks() * kBlock, 1, kResident));
    total += grids.back();
  }
  const auto bytes = any.options().dtype(at::kByte);
  at::Tensor workspace = at::empty({static_cast<int64_t>(total * sizeof(Findings) + sizeof(unsigned))}, bytes);
  at::Tensor out = at::empty({math::kStatsFields}, any.options().dtype(at::kDouble));
  auto* all = reinterpret_cast<Findings*>(workspace.mutable_data_ptr());
  auto* finished = reinterpret_cast<unsigned*>(all + total);
  C10_CUDA_CHECK(cudaMemsetAsync(finished, 0, sizeof(unsigned), c10::cuda::getCurrentCUDAStream()));
  Findings* partial = all;
  for (size_t i = 0; i < tables.size(); ++i) {
    TOLARIA_LAUNCH(stats_kernel, grids[i], kBlock, tables[i], partial, all, total, finished,
                   out.mutable_data_ptr<double>());
    partial += grids[i];
  }
  return out;
}

}  // namespace tolaria

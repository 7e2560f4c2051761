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

// What a block found; `first` is the smallest place of a tensor with a non-finite value, or kNowhere.
struct BlockStats {
  Stats stats;
  int64_t first;
};
constexpr int64_t kNowhere = INT64_MAX;

__device__ inline Stats warp_merge(Stats stats) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    Stats other;
    other.sum_squares = __shfl_down_sync(cuda::kAllLanes, stats.sum_squares, offset);
    other.max_abs = __shfl_down_sync(cuda::kAllLanes, stats.max_abs, offset);
    other.nonfinite = __shfl_down_sync(cuda::kAllLanes, stats.nonfinite, offset);
    stats.merge(other);
  }
  return stats;
}

// The statistics of all threads, in thread 0.
__device__ inline Stats block_merge(Stats stats) {
  __shared__ double sums[kBlock / kWarp], peaks[kBlock / kWarp];
  __shared__ int64_t counts[kBlock / kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  stats = warp_merge(stats);
  if (lane == 0) {
    sums[warp] = stats.sum_squares;
    peaks[warp] = stats.max_abs;
    counts[warp] = stats.nonfinite;
  }
  __syncthreads();
  Stats result;
  if (warp == 0) {
    if (lane < kBlock / kWarp) {
      result.sum_squares = sums[lane];
      result.max_abs = peaks[lane];
      result.nonfinite = counts[lane];
    }
    result = warp_merge(result);
  }
  __syncthreads();
  return result;
}

template <typename scalar_t>
__device__ inline void take_in(scalar_t value, Stats& stats) {
  const double wide = math::finite_or_zero(value), size = wide < 0 ? -wide : wide;
  stats.sum_squares += wide * wide;
  stats.max_abs = stats.max_abs < size ? size : stats.max_abs;
  stats.nonfinite += !math::is_finite(value);
}

template <typename scalar_t>
__device__ Stats chunk_stats(const void* base, int64_t start, int64_t n) {
  constexpr int N = 16 / sizeof(scalar_t);
  const scalar_t* data = static_cast<const scalar_t*>(base) + start;
  Stats stats;
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) {
    for (int64_t i = threadIdx.x; i < n; i += kBlock) take_in(data[i], stats);
    return stats;
  }
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i + N <= n; i += kBlock * N) {
    const auto pack = cuda::load_whole<N>(data + i);
#pragma unroll
    for (int j = 0; j < N; ++j) take_in(pack.value[j], stats);
  }
  for (int64_t i = n / N * N + threadIdx.x; i < n; i += kBlock) take_in(data[i], stats);
  return stats;
}

__device__ Stats chunk_stats_of(at::ScalarType type, const void* base, int64_t start, int64_t n) {
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

// The blocks of one table write `partial`; the last of all `total` blocks, over all tables, writes `out`.
__global__ void __launch_bounds__(kBlock) stats_kernel(const __grid_constant__ TensorTable table, BlockStats* partial,
                                                       BlockStats* all, unsigned total, unsigned* finished,
                                                       double* out) {
  Stats stats;  // of the block, in thread 0
  int64_t first = kNowhere;
  for (int64_t chunk = blockIdx.x; chunk < table.chunks(); chunk += gridDim.x) {
    const int tensor = table.find(chunk);
    const int64_t before = tensor == 0 ? 0 : table.end[tensor - 1];
    const int64_t start = (chunk - before) * cuda::kChunkElements;
    const int64_t n = min(cuda::kChunkElements, table.size[tensor] - start);
    const auto type = static_cast<at::ScalarType>(table.type[tensor]);
    const Stats found = block_merge(chunk_stats_of(type, table.data[tensor], start, n));
    stats.merge(found);
    if (found.nonfinite > 0 && table.index[tensor] < first) first = table.index[tensor];
  }
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = {stats, first};
    __threadfence();  // the partial result is visible before this block counts as finished
    is_last = atomicAdd(finished, 1u) == total - 1;
  }
  __syncthreads();
  if (!is_last || threadIdx.x != 0) return;
  __threadfence();  // and the others' are read after
  Stats sum;
  first = kNowhere;
  for (unsigned i = 0; i < total; ++i) {
    const volatile BlockStats& block = all[i];
    Stats other;
    other.sum_squares = block.stats.sum_squares;
    other.max_abs = block.stats.max_abs;
    other.nonfinite = block.stats.nonfinite;
    sum.merge(other);
    first = block.first < first ? block.first : first;
  }
  out[math::kSumSquares] = sum.sum_squares;
  out[math::kMaxAbs] = sum.max_abs;
  out[math::kNonfiniteCount] = static_cast<double>(sum.nonfinite);
  out[math::kFirstNonfinite] = first == kNowhere ? -1.0 : static_cast<double>(first);
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
    grids.push_back(cuda::grid_for(table.chunks() * kBlock, 1, 4));
    total += grids.back();
  }
  const auto bytes = any.options().dtype(at::kByte);
  at::Tensor workspace = at::empty({static_cast<int64_t>(total * sizeof(BlockStats) + sizeof(unsigned))}, bytes);
  at::Tensor out = at::empty({math::kStatsFields}, any.options().dtype(at::kDouble));
  auto* all = reinterpret_cast<BlockStats*>(workspace.mutable_data_ptr());
  auto* finished = reinterpret_cast<unsigned*>(all + total);
  C10_CUDA_CHECK(cudaMemsetAsync(finished, 0, sizeof(unsigned), c10::cuda::getCurrentCUDAStream()));
  BlockStats* partial = all;
  for (size_t i = 0; i < tables.size(); ++i) {
    TOLARIA_LAUNCH(stats_kernel, grids[i], kBlock, tables[i], partial, all, total, finished,
                   out.mutable_data_ptr<double>());
    partial += grids[i];
  }
  return out;
}

}  // namespace tolaria

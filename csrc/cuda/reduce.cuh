// Sums in a fixed order: within a warp, a block, and over rows of partial sums. No float atomics.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cuda/last_block.cuh"
#include "cuda/launch.cuh"

namespace tolaria::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// The sum over a warp, in lane 0.
__device__ inline double warp_sum(double value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(kAllLanes, value, offset);
  return value;
}

// The sum over a block of kBlock threads, in thread 0. All threads call it; it may be called again at once.
__device__ inline double block_sum(double value) {
  __shared__ double warps[kBlock / kWarp];
  value = warp_sum(value);
  __syncthreads();  // the sums of the call before have been read
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = threadIdx.x < kBlock / kWarp ? warps[threadIdx.x] : 0.0;
  return threadIdx.x < kWarp ? warp_sum(value) : 0.0;
}

// out[m] = sum over r of partial[r * mid + m]. A block takes `columns` (a power of two) neighbours, and kBlock / columns
// threads for each: these add every so many rows, then each other.
static __global__ void __launch_bounds__(kBlock)
    sum_rows_kernel(const double* partial, int64_t rows, int64_t mid, int columns, double* out) {
  __shared__ double sums[kBlock];
  const int thread = static_cast<int>(threadIdx.x), lanes = kBlock / columns;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * columns;
  for (int64_t start = static_cast<int64_t>(blockIdx.x) * columns; start < mid; start += stride) {
    const int64_t m = start + thread % columns;
    double sum = 0;
    if (m < mid) {
      for (int64_t r = thread / columns; r < rows; r += lanes) sum += partial[r * mid + m];
    }
    sums[thread] = sum;
    for (int half = kBlock / 2; half >= columns; half /= 2) {
      __syncthreads();
      if (thread < half) sums[thread] += sums[thread + half];
    }
    if (thread < columns && m < mid) out[m] = sums[thread];
    __syncthreads();
  }
}

inline void sum_rows(const double* partial, int64_t rows, int64_t mid, double* out) {
  const int64_t widest = rows < kWarp ? kBlock : kWarp;  // few rows need no helpers
  const int columns = static_cast<int>(std::min<int64_t>(widest, std::bit_ceil(static_cast<uint64_t>(mid))));
  TOLARIA_LAUNCH(sum_rows_kernel, grid_for(mid * (kBlock / columns), 1), kBlock, partial, rows, mid, columns, out);
}

}  // namespace tolaria::cuda

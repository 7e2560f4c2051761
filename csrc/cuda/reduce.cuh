// Sums in a fixed order: within a warp, a block, and over rows of partial sums. No float atomics.
#pragma once

#include <cstdint>

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

// The sum over a block of kBlock threads, in thread 0. All threads call it; it may be called again after a barrier.
__device__ inline double block_sum(double value) {
  __shared__ double warps[kBlock / kWarp];
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = threadIdx.x < kBlock / kWarp ? warps[threadIdx.x] : 0.0;
  return threadIdx.x < kWarp ? warp_sum(value) : 0.0;
}

// out[m] = sum over r of partial[r * mid + m]: a thread for each m, for many m.
static __global__ void __launch_bounds__(kBlock)
    sum_rows_wide_kernel(const double* partial, int64_t rows, int64_t mid, double* out) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t m = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; m < mid; m += stride) {
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) sum += partial[r * mid + m];
    out[m] = sum;
  }
}

// The same with a block for each m, for many rows.
static __global__ void __launch_bounds__(kBlock)
    sum_rows_tall_kernel(const double* partial, int64_t rows, int64_t mid, double* out) {
  for (int64_t m = blockIdx.x; m < mid; m += gridDim.x) {
    double sum = 0;
    for (int64_t r = threadIdx.x; r < rows; r += kBlock) sum += partial[r * mid + m];
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[m] = sum;
    __syncthreads();
  }
}

inline void sum_rows(const double* partial, int64_t rows, int64_t mid, double* out) {
  if (rows > 64 && mid < 65536) {
    TOLARIA_LAUNCH(sum_rows_tall_kernel, static_cast<unsigned>(mid), kBlock, partial, rows, mid, out);
  } else {
    TOLARIA_LAUNCH(sum_rows_wide_kernel, grid_for(mid, 1), kBlock, partial, rows, mid, out);
  }
}

}  // namespace tolaria::cuda

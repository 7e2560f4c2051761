// The only place that launches: block size, grid, current stream, launch check.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdint>

namespace tolaria::cuda {

constexpr int kBlock = 256;

inline int multiprocessors() {
  int device = 0, count = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Blocks of kBlock threads for n items, each thread taking items_per_thread at a time; grid-stride beyond that.
inline unsigned grid_for(int64_t n, int64_t items_per_thread, int blocks_per_multiprocessor = 8) {
  const int64_t wanted = (n + kBlock * items_per_thread - 1) / (kBlock * items_per_thread);
  const int64_t limit = static_cast<int64_t>(multiprocessors()) * blocks_per_multiprocessor;
  return static_cast<unsigned>(std::max<int64_t>(1, std::min(wanted, limit)));
}

}  // namespace tolaria::cuda

#define TOLARIA_LAUNCH(kernel, grid, block, ...)                                    \
  do {                                                                              \
    kernel<<<(grid), (block), 0, c10::cuda::getCurrentCUDAStream()>>>(__VA_ARGS__); \
    C10_CUDA_KERNEL_LAUNCH_CHECK();                                                 \
  } while (false)

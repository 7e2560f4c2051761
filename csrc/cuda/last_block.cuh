// Which block of a launch finishes last, so that one launch can both work in parallel and conclude.
#pragma once

namespace tolaria::cuda {

// True in every thread of the block that finishes last of `blocks`; all that the others wrote before is visible to it.
//
// Each thread fences its own writes; the barrier puts all of them before thread 0's count, so a block that has counted
// has published everything. Whoever reads the last count then fences again, lest its reads were made earlier. What other
// blocks wrote must not have been read by this one before: a first-level cache may hold the old values.
template <typename counter_t>
__device__ bool is_last_block(counter_t* finished, unsigned blocks) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(finished, counter_t{1}) == blocks - 1;
  __syncthreads();
  if (is_last) __threadfence();
  return is_last;
}

}  // namespace tolaria::cuda

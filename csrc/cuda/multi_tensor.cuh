// A list of tensors whose addresses move (gradients), handed to a kernel by value: one launch for each table.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

#include "cuda/launch.cuh"

namespace tolaria::cuda {

// Elements of a chunk: what a block takes at a time.
constexpr int64_t kChunkElements = 32768;

// Bytes of kernel parameters: CUDA 12.1 raised the limit from 4,096 to 32,764; room is left for the other parameters.
#if CUDART_VERSION >= 12010
constexpr int64_t kParameterBytes = 32764;
#else
constexpr int64_t kParameterBytes = 4096;
#endif
constexpr int kTableTensors = static_cast<int>((kParameterBytes - 128) / 29);

struct TensorTable {
  const void* data[kTableTensors];
  int64_t size[kTableTensors];
  int64_t end[kTableTensors];   // chunks up to and including this tensor's
  int32_t index[kTableTensors];  // its place in the caller's list
  uint8_t type[kTableTensors];   // at::ScalarType
  int32_t count = 0;

  bool is_full() const { return count == kTableTensors; }

  void add(const at::Tensor& tensor, int64_t place) {
    const int64_t chunks = (tensor.numel() + kChunkElements - 1) / kChunkElements;
    data[count] = tensor.const_data_ptr();
    size[count] = tensor.numel();
    end[count] = chunks + this->chunks();
    index[count] = static_cast<int32_t>(place);
    type[count] = static_cast<uint8_t>(tensor.scalar_type());
    ++count;
  }

  C10_HOST_DEVICE int64_t chunks() const { return count == 0 ? 0 : end[count - 1]; }

  // The tensor that chunk number `chunk` belongs to.
  C10_HOST_DEVICE int find(int64_t chunk) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (chunk < end[middle]) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
};
static_assert(sizeof(TensorTable) + 64 <= kParameterBytes, "a kernel's parameters must fit");

}  // namespace tolaria::cuda

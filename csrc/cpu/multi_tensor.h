// One parallel region over a whole list of tensors, cut into chunks that do not depend on the number of threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <algorithm>
#include <vector>

namespace tolaria::cpu {

// Elements of a chunk: the unit of a partial result.
inline constexpr int64_t kChunkElements = 32768;
// Elements handed to a thread at the least.
inline constexpr int64_t kListGrain = 32768;

struct Chunk {
  const void* data;
  int64_t size;
  int64_t start;  // elements of the list before this chunk
  int64_t tensor;
  at::ScalarType type;
};

class ChunkList {
 public:
  // Adds a dense tensor, which must outlive the list.
  void add(const at::Tensor& tensor, int64_t index) {
    const auto type = tensor.scalar_type();
    const auto* data = static_cast<const char*>(tensor.const_data_ptr());
    const int64_t n = tensor.numel(), item = static_cast<int64_t>(tensor.itemsize());
    for (int64_t at = 0; at < n; at += kChunkElements) {
      const int64_t size = std::min(kChunkElements, n - at);
      chunks_.push_back({data + at * item, size, total_, index, type});
      total_ += size;
    }
  }

  const std::vector<Chunk>& chunks() const { return chunks_; }

  // Calls body(chunk number) once for each chunk, on all threads, an equal share of elements for each.
  template <class Body>
  void parallel_for_each(const Body& body) const {
    at::parallel_for(0, total_, kListGrain, [&](int64_t begin, int64_t end) {
      const auto before = [](const Chunk& chunk, int64_t element) { return chunk.start < element; };
      auto chunk = std::lower_bound(chunks_.begin(), chunks_.end(), begin, before);
      for (; chunk != chunks_.end() && chunk->start < end; ++chunk) body(chunk - chunks_.begin());
    });
  }

 private:
  std::vector<Chunk> chunks_;
  int64_t total_ = 0;
};

}  // namespace tolaria::cpu

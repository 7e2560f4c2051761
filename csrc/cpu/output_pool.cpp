// The memory of large outputs on the CPU, kept from one use to the next. Forward and backward of blend, whose three outputs
// glibc gave back to the system every time: at 8 MiB 3.3 ms with fresh blocks, 2.1 from the pool; at 64 MiB torch.lerp with
// clamp takes 118 ms, a plain loop 118 with fresh outputs and 13 with used ones, blend from the pool 17 (two cores of a
// Zen 3 server under KVM).
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "common/fresh.h"
#include "ops.h"

#ifdef TOLARIA_SANITIZE
#include <sanitizer/asan_interface.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#define TOLARIA_HAS_FORK 1
#include <pthread.h>
#endif

namespace tolaria {
namespace {

// What may lie idle on a large machine in any case. More may where the outputs of one time have been larger, see
// OutputPool::allowance: three of 256 MiB, forward and backward of blend with grad_alpha, took 490 ms and with all of them
// kept 54.
constexpr size_t kIdleBytes = size_t(512) << 20;
constexpr int64_t kMemoryShare = 8;  // at most this part of the memory that the process may have
constexpr uint64_t kPatience = 256;  // allocations that an idle block waits for one that it fits

// The address of a block's bytes is all that a tensor's storage knows of it, as with torch's own allocator: a lazy copy asks
// for that. What the pool knows lies before them, on a page of its own: an offset of less would put the output's lines
// beside other lines of the inputs' than fresh memory does.
constexpr size_t kHeader = 4096;

struct Block {
  c10::DataPtr memory;
  size_t bytes;
  uint64_t idle_since = 0;

  char* data() const { return static_cast<char*>(memory.get()) + kHeader; }
};
using Blocks = std::vector<std::unique_ptr<Block>>;

Block*& block_before(void* data) { return *reinterpret_cast<Block**>(static_cast<char*>(data) - kHeader); }

// Asks for large pages behind memory that nobody has written yet: the system then hands out 2 MiB at a fault rather than
// 4 KiB. Whole large pages inside the block alone, so that no byte more is taken. A wish: refused, nothing is lost.
void ask_for_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = uintptr_t(1) << 21;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t last = (begin + bytes) / kLargePage * kLargePage;
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// AddressSanitizer reports whoever touches what lies idle, or the room behind an output in a larger block.
#ifdef TOLARIA_SANITIZE
void forbid(void* memory, size_t bytes) { ASAN_POISON_MEMORY_REGION(memory, bytes); }
void permit(void* memory, size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(memory, bytes); }
#else
void forbid(void*, size_t) {}
void permit(void*, size_t) {}
#endif

// Nobody waits for anybody: who finds the pool in use goes to torch's allocator.
class OutputPool final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    std::unique_ptr<Block> block = take(bytes);
    if (block == nullptr) {
      block = std::make_unique<Block>(Block{fresh(kHeader + bytes), bytes});
      ask_for_large_pages(block->data(), bytes);
    }
    const size_t used = used_ += block->bytes;
    for (size_t peak = peak_; used > peak && !peak_.compare_exchange_weak(peak, used);) {
    }
    void* data = block->data();
    permit(data, bytes);
    block_before(data) = block.release();
    return {data, data, &give_back, c10::Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }

  static bool owns(const c10::DataPtr& memory) { return memory.get_deleter() == &give_back; }

  int64_t release() {
    Blocks freed;
    const std::lock_guard lock(mutex_);
    freed.swap(idle_);
    peak_ = used_.load();
    return static_cast<int64_t>(std::exchange(idle_bytes_, 0));
  }

#ifdef TOLARIA_HAS_FORK
  // A fork waits for whoever is at the pool, so that the child finds it whole and open.
  void stay_open_across_forks() {
    (void)pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                         [] { instance().mutex_.unlock(); });
  }
#endif

  static OutputPool& instance();

 private:
  static void give_back(void* data);

  // New memory; where there is none, what lies idle goes back to the system first.
  c10::DataPtr fresh(size_t bytes) {
    try {
      return c10::GetCPUAllocator()->allocate(bytes);
    } catch (const c10::Error&) {
      if (release() == 0) throw;
    }
    return c10::GetCPUAllocator()->allocate(bytes);
  }

  // The block given back last that is large enough and at most an eighth too large: it is likely still in the caches.
  std::unique_ptr<Block> take(size_t bytes) {
    Blocks freed;  // after the lock
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    ++clock_;
    std::unique_ptr<Block> found;
    for (auto it = idle_.end(); it != idle_.begin() && found == nullptr;) {
      if (const size_t held = (*--it)->bytes; bytes <= held && held - bytes <= bytes / 8) found = remove(it);
    }
    while (!idle_.empty() && clock_ - idle_.front()->idle_since > kPatience) freed.push_back(remove(idle_.begin()));
    if (found == nullptr) trim(freed, used_ + bytes);
    return found;
  }

  void put(std::unique_ptr<Block> block) noexcept {
    const size_t bytes = block->bytes, used = used_ -= bytes;
    Blocks freed;
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return;
    forbid(block->data(), bytes);
    block->idle_since = clock_;
    try {
      idle_.push_back(std::move(block));
      idle_bytes_ += bytes;
      trim(freed, used);
    } catch (const std::bad_alloc&) {  // no room for the lists themselves: the block at hand is freed
    }
  }

  // How much may lie idle beside what is in use: with it no more than was in use at once at the peak, or 512 MiB. In a
  // small container far less: its limit kills, no allocation fails first.
  size_t allowance(size_t used) const {
    const size_t peak = peak_, below_peak = peak > used ? peak - used : 0;
    return std::min(std::max(kIdleBytes, below_peak), static_cast<size_t>(memory_limit() / kMemoryShare));
  }

  void trim(Blocks& freed, size_t used) {
    while (idle_bytes_ > allowance(used)) freed.push_back(remove(idle_.begin()));
  }

  std::unique_ptr<Block> remove(Blocks::iterator it) {
    std::unique_ptr<Block> block = std::move(*it);
    idle_.erase(it);
    idle_bytes_ -= block->bytes;
    return block;
  }

  std::mutex mutex_;
  Blocks idle_;  // the longest idle first
  size_t idle_bytes_ = 0;
  std::atomic<size_t> used_ = 0, peak_ = 0;  // bytes in tensors now, and at the most since the last release
  uint64_t clock_ = 0;
};

// Never destroyed: tensors may outlive every static object.
OutputPool& OutputPool::instance() {
  static auto* const pool = [] {
    auto* const made = new OutputPool;
#ifdef TOLARIA_HAS_FORK
    made->stay_open_across_forks();
#endif
    return made;
  }();
  return *pool;
}

void OutputPool::give_back(void* data) { instance().put(std::unique_ptr<Block>(block_before(data))); }

}  // namespace

c10::Allocator* output_pool() { return &OutputPool::instance(); }

bool is_pooled(const c10::DataPtr& memory) { return OutputPool::owns(memory); }

int64_t release_idle_outputs() { return OutputPool::instance().release(); }

}  // namespace tolaria

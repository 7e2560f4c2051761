// From how many bytes on a pass writes past the caches.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <fstream>
#include <string>

#include "ops.h"

#if defined(__linux__)
#include <unistd.h>
#endif

namespace tolaria {
namespace {

// What is told of a cache says nothing of who shares it: a virtual machine of two cores is told of all 300 MiB of a
// Sapphire Rapids server's, and blend on 8 MiB (24 MiB a forward) took 1.27 ms for 1.05 when it trusted that. More than
// this is taken for a stranger's; a Zen 3 core, which has so much, is served best by it, too.
constexpr int64_t kMostOfACache = int64_t(32) << 20;

// The kernel's word comes first. glibc (2.36) adds up the whole package's on AMD: 256 MiB where a core shares 32, and
// blend on 8 MiB took 1.24 times as long.
int64_t find_last_level_cache() {
  for (int index = 4; index >= 0; --index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
    int64_t size = 0;
    char unit = 0;
    if (file >> size >> unit && size > 0) return size * (unit == 'M' ? int64_t(1) << 20 : int64_t(1) << 10);
  }
#if defined(_SC_LEVEL3_CACHE_SIZE)
  const long size = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (size > 0) return size;
#endif
  return kMostOfACache;
}

// Half of the cache, since a training step has other tensors in there. Forward and backward of blend and an op that reads
// the gradients took 0.93 to 0.98 times as long so on 8 MiB (24 MiB a forward), 1.20 to 1.25 times on 4 MiB; without the
// reader 0.84 to 0.92 and 1.09 to 1.18 times (32 MiB of cache, Zen 3).
std::atomic<int64_t>& bytes() {
  static std::atomic<int64_t> value = std::min(last_level_cache(), kMostOfACache) / 2;
  return value;
}

}  // namespace

int64_t last_level_cache() {
  static const int64_t size = find_last_level_cache();
  return size;
}

int64_t stream_above() { return bytes().load(std::memory_order_relaxed); }

int64_t set_stream_above(int64_t value) { return bytes().exchange(value); }

}  // namespace tolaria

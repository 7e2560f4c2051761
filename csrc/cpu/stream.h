// Stores that leave the caches alone: no line is read before it is overwritten, and nothing else is driven out.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace tolaria::cpu {

inline constexpr int64_t kLine = 64;
// Where a streamed target must start.
inline constexpr uintptr_t kStreamAlign = 16;

// Copies one line; elsewhere than on x86-64 an ordinary copy. Four 16-byte stores fill the same write buffer as wider
// ones would: memory, not the processor, is the limit.
TOLARIA_INLINE void stream_line(char* target, const char* source) {
#if defined(__SSE2__)
  for (int64_t at = 0; at < kLine; at += 16) {
    const __m128i word = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at));
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + at), word);
  }
#else
  std::memcpy(target, source, kLine);
#endif
}

// Streamed stores are seen by other threads after this; call it before the region ends.
TOLARIA_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace tolaria::cpu

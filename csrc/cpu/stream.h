// Stores that leave the caches alone: no line is read before it is overwritten, and nothing else is driven out.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/isa.h"
#include "ops.h"

// The sanitizers (build_tools/sanitize.py) do not see what a streamed store writes: there every store is an ordinary one.
#if defined(__SSE2__) && !defined(TOLARIA_SANITIZE)
#define TOLARIA_STREAMS 1
#include <emmintrin.h>
#endif

namespace tolaria::cpu {

inline constexpr int64_t kLine = 64;
// Where a streamed target must start.
inline constexpr uintptr_t kStreamAlign = 16;
// How far ahead of a streamed pass memory is asked for: 5% of a copy, 8% of blend on 64 MiB and 12% of its gradients with
// alpha's (Zen 3; 512 as much, 2048 less).
inline constexpr int64_t kStreamAhead = 1024;

// Copies one line; elsewhere than on x86-64 an ordinary copy. Four 16-byte stores fill the same write buffer as wider
// ones would: memory, not the processor, is the limit.
TOLARIA_INLINE void stream_line(char* target, const char* source) {
#ifdef TOLARIA_STREAMS
  for (int64_t at = 0; at < kLine; at += 16) {
    const __m128i word = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at));
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + at), word);
  }
#else
  std::memcpy(target, source, kLine);
#endif
}

// Running sums side by side; a fixed number, so that every instruction set adds in one order.
inline constexpr int64_t kLanes = 16;

// Elements of these types that a loop computes and stores together, few enough for GCC to keep them in registers: bfloat16
// goes in pairs (cpu/pack.h). Other conversions from and to 16 bits only become vector code in longer loops; their results
// wait in the first-level cache.
template <typename... T>
inline constexpr int64_t kPack = (std::is_same_v<T, c10::BFloat16> && ...) ? 2 * kLanes
                                 : ((sizeof(T) == 2) || ...)               ? 16 * kLanes
                                                                           : kLanes;

// Stores a pack (aligned to a line) past the caches or through them.
template <bool kStreams, typename T, size_t n>
TOLARIA_INLINE void store_pack(T* target, const T (&values)[n]) {
#ifdef TOLARIA_STREAMS
  if constexpr (kStreams) {
    for (size_t at = 0; at < n; at += kStreamAlign / sizeof(T)) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + at),
                       _mm_load_si128(reinterpret_cast<const __m128i*>(values + at)));
    }
    return;
  }
#endif
  for (size_t l = 0; l < n; ++l) target[l] = values[l];  // GCC would take a memcpy through the stack
}

// Asks for the pack that a streamed pass reads kStreamAhead later. Into all caches: the hint for one use (prefetchnta) made
// such a pass two to three times slower on a Sapphire Rapids server.
template <bool kStreams, int64_t n, typename T>
TOLARIA_INLINE void prefetch_pack([[maybe_unused]] const T* pack) {
  if constexpr (kStreams) {
    const char* ahead = reinterpret_cast<const char*>(pack) + kStreamAhead;
    for (int64_t at = 0; at < n * static_cast<int64_t>(sizeof(T)); at += kLine) prefetch(ahead + at);
  }
}

TOLARIA_INLINE bool is_streamable(const void* target) {
  return target != nullptr && reinterpret_cast<uintptr_t>(target) % kStreamAlign == 0;
}

// Whether a pass moves so much that what it writes is better not kept in the caches.
inline bool outgrows_caches(int64_t bytes) { return bytes > stream_above(); }

// Streamed stores are seen by other threads after this; call it before the region ends.
TOLARIA_INLINE void stream_fence() {
#ifdef TOLARIA_STREAMS
  _mm_sfence();
#endif
}

inline void plain_run(char* target, const char* source, int64_t bytes) { std::memcpy(target, source, bytes); }

// The same past the caches.
inline void stream_run(char* target, const char* source, int64_t bytes) {
  int64_t at = 0;
  if (is_streamable(target)) {
    for (; at + kLine <= bytes; at += kLine) {
      prefetch(source + at + kStreamAhead);
      stream_line(target + at, source + at);
    }
    stream_fence();
  }
  std::memcpy(target + at, source + at, bytes - at);
}

}  // namespace tolaria::cpu

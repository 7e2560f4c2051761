// Run-time choice of the instruction set: the same loop compiled for the baseline, AVX2 and AVX-512, picked once.
//
// A kernel is a struct with a static `TOLARIA_INLINE void run(args...)`; `vectorised<Kernel>(args...)` calls the widest
// copy that this machine can execute. Without contraction every copy computes the same bits.
#pragma once

#include <utility>

#if defined(__GNUC__)
#define TOLARIA_INLINE inline __attribute__((always_inline))
#define TOLARIA_INLINE_LAMBDA __attribute__((always_inline))
#else
#define TOLARIA_INLINE inline
#define TOLARIA_INLINE_LAMBDA
#endif

// Before a loop whose element i depends on element i alone, of pointers that are equal or far apart (restrict would
// forbid the former): no check at run time, no scalar loop where they are equal.
#if defined(__GNUC__) && !defined(__clang__)
#define TOLARIA_ELEMENTWISE _Pragma("GCC ivdep")
#else
#define TOLARIA_ELEMENTWISE
#endif

// Before a short loop over lanes: unrolled ahead of the vectoriser, its array would become so many scalars.
#if defined(__GNUC__) && !defined(__clang__)
#define TOLARIA_LANES _Pragma("GCC unroll 1")
#else
#define TOLARIA_LANES
#endif

#if defined(__GNUC__) && defined(__x86_64__)
#define TOLARIA_HAS_X86_VARIANTS 1
#endif

namespace tolaria::cpu {

// Asks for the cache line at `address`, which need not be readable.
TOLARIA_INLINE void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#endif
}

#ifdef TOLARIA_HAS_X86_VARIANTS

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa detect_isa() {
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has_avx512 ? Isa::kAvx512 : has_avx2 ? Isa::kAvx2 : Isa::kBaseline;
}

inline const Isa kIsa = detect_isa();

template <class Kernel, class... Args>
__attribute__((target("avx2,fma,bmi,bmi2,lzcnt,f16c"))) auto run_avx2(Args... args) {
  return Kernel::run(args...);
}

// GCC vectorises with 256 bits unless it is told. clang uses 512 where it may, and ignores the whole attribute, down to
// avx512f, if it holds a word that it does not know.
#ifdef __clang__
#define TOLARIA_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,lzcnt,f16c"
#else
#define TOLARIA_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,lzcnt,f16c,prefer-vector-width=512"
#endif

template <class Kernel, class... Args>
__attribute__((target(TOLARIA_AVX512))) auto run_avx512(Args... args) {
  return Kernel::run(args...);
}

template <class Kernel, class... Args>
auto vectorised(Args... args) {
  switch (kIsa) {
    case Isa::kAvx512: return run_avx512<Kernel>(args...);
    case Isa::kAvx2: return run_avx2<Kernel>(args...);
    default: return Kernel::run(args...);
  }
}

#else

template <class Kernel, class... Args>
auto vectorised(Args... args) {
  return Kernel::run(args...);
}

#endif

}  // namespace tolaria::cpu

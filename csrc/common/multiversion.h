// Run-time choice of the instruction set: one function, compiled for several, the best one bound at load time.
#pragma once

// x86-64-v3 is AVX2, v4 is AVX-512. Elsewhere (Arm, other compilers) the one version is the target's own: NEON is part
// of the Arm baseline. Contraction into FMA is off everywhere, so every version gives the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define TOLARIA_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define TOLARIA_MULTIVERSION
#endif

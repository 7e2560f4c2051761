// A pack of elements through a function of their arithmetic type, in loops that GCC turns into vector code.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/isa.h"

#ifdef TOLARIA_HAS_X86_VARIANTS
#include <immintrin.h>
#endif

namespace tolaria::cpu {

// Elements of one type as those of another; of the same type as bytes, since a compiler may pass a NaN through a register
// that quiets it.
template <typename out_t, typename in_t>
TOLARIA_INLINE void convert(out_t* C10_RESTRICT out, const in_t* C10_RESTRICT in, int64_t n) {
  if constexpr (std::is_same_v<out_t, in_t>) {
    std::memcpy(static_cast<void*>(out), in, n * sizeof(out_t));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<out_t>(in[i]);
  }
}

// Whether float16 is widened and narrowed by the processor (F16C), not by integer arithmetic: every processor with AVX2 can.
#ifdef TOLARIA_HAS_X86_VARIANTS
inline const bool kHasF16c = kIsa != Isa::kBaseline;

// n, a multiple of 8, float16 to float32.
__attribute__((target("avx2,f16c"))) inline void widen_f16c(const c10::Half* in, float* out, size_t n) {
  for (size_t i = 0; i < n; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
}

// And back, to nearest, ties to even; a NaN becomes the one of its sign that c10::Half(float) makes of it.
__attribute__((target("avx2,f16c"))) inline void narrow_f16c(const float* in, c10::Half* out, size_t n) {
  const __m256 sign = _mm256_set1_ps(-0.0f), quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  for (size_t i = 0; i < n; i += 8) {
    const __m256 value = _mm256_loadu_ps(in + i), nan = _mm256_or_ps(_mm256_and_ps(value, sign), quiet);
    const __m256 clean = _mm256_blendv_ps(value, nan, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(clean, _MM_FROUND_TO_NEAREST_INT));
  }
}
#else
inline constexpr bool kHasF16c = false;
inline void widen_f16c(const c10::Half*, float*, size_t) {}
inline void narrow_f16c(const float*, c10::Half*, size_t) {}
#endif

// n elements as float32: where they lie, or in `room`.
template <size_t n, typename T>
TOLARIA_INLINE const float* widened(const T* in, float (&room)[n]) {
  if constexpr (std::is_same_v<T, float>) {
    return in;
  } else if constexpr (std::is_same_v<T, c10::Half>) {
    widen_f16c(in, room, n);
  } else {
    for (size_t l = 0; l < n; ++l) room[l] = static_cast<float>(in[l]);
  }
  return room;
}

// Two neighbouring bfloat16 as the 32-bit word that holds them: widened by a shift and a mask, rounded and joined without
// leaving 32-bit lanes. Element by element, half of the instructions of a loop narrow and permute.
struct BFloat16Pairs {
  static TOLARIA_INLINE uint32_t load(const c10::BFloat16* pair) {
    uint32_t word;
    std::memcpy(&word, pair, sizeof(word));
    return word;
  }

  static TOLARIA_INLINE float widened(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

  static TOLARIA_INLINE float low(uint32_t word) { return widened(word << 16); }
  static TOLARIA_INLINE float high(uint32_t word) { return widened(word & 0xffff0000u); }

  // To nearest, ties to even, in the upper half: as c10::BFloat16(float), but a NaN keeps its upper bits. To select one NaN
  // for all took a fifth of the time (Zen 3). The lower bits of a NaN must be zero, as those of bfloat16 and of the
  // processor's own are: others could carry it over into a number.
  static TOLARIA_INLINE uint32_t rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits + 0x7fffu + ((bits >> 16) & 1u);
  }

  static TOLARIA_INLINE void store(c10::BFloat16* pair, float low, float high) {
    const uint32_t word = (rounded(low) >> 16) | (rounded(high) & 0xffff0000u);
    std::memcpy(pair, &word, sizeof(word));
  }
};

// A parameter of the functions below: any NaN becomes the one without a payload.
template <typename acc_t>
TOLARIA_INLINE acc_t without_payload(acc_t value) {
  return value != value ? std::numeric_limits<acc_t>::quiet_NaN() : value;
}

// Calls use(w, low, high) with f of the elements 2w and 2w + 1 of n bfloat16 each.
template <size_t n, class F, class Use, typename... in_t>
TOLARIA_INLINE void for_each_pair(const F& f, const Use& use, const in_t*... in) {
  using Pairs = BFloat16Pairs;
  TOLARIA_LANES
  for (size_t w = 0; w < n / 2; ++w) {
    use(w, f(Pairs::low(Pairs::load(in + 2 * w))...), f(Pairs::high(Pairs::load(in + 2 * w))...));
  }
}

template <typename... T>
inline constexpr bool are_bfloat16 = (std::is_same_v<T, c10::BFloat16> && ...);
template <typename... T>
inline constexpr bool has_float16 = (std::is_same_v<T, c10::Half> || ...);

// out[i] = f(in[i]...) with float16 widened and narrowed by the processor.
template <typename out_t, size_t n, class F, size_t... which, typename... in_t>
TOLARIA_INLINE void map_widened(out_t (&out)[n], const F& f, std::index_sequence<which...>, const in_t*... in) {
  float room[sizeof...(in)][n], result[n];
  const float* wide[] = {widened(in, room[which])...};
  for (size_t l = 0; l < n; ++l) result[l] = f(wide[which][l]...);
  if constexpr (std::is_same_v<out_t, c10::Half>) {
    narrow_f16c(result, out, n);
  } else {
    for (size_t l = 0; l < n; ++l) out[l] = static_cast<out_t>(result[l]);
  }
}

// out[i] = f(in[i]...), computed in acc_t; what f knows beside is without_payload.
template <typename acc_t, typename out_t, size_t n, class F, typename... in_t>
TOLARIA_INLINE void map_pack(out_t (&out)[n], const F& f, const in_t*... in) {
  if constexpr (are_bfloat16<out_t, in_t...>) {
    const auto store = [&out](size_t w, acc_t low, acc_t high) TOLARIA_INLINE_LAMBDA {
      BFloat16Pairs::store(out + 2 * w, low, high);
    };
    for_each_pair<n>(f, store, in...);
    return;
  }
  if constexpr (has_float16<out_t, in_t...> && std::is_same_v<acc_t, float>) {
    if (kHasF16c) return map_widened(out, f, std::index_sequence_for<in_t...>(), in...);
  }
  TOLARIA_LANES
  for (size_t l = 0; l < n; ++l) out[l] = static_cast<out_t>(f(static_cast<acc_t>(in[l])...));
}

// Adds f(in[i]...) of all n elements to the lanes of a sum: which element goes to which lane is nobody's business, and the
// even ones of bfloat16 lie side by side already.
template <typename acc_t, size_t n, size_t lane_count, class F, typename... in_t>
TOLARIA_INLINE void add_pack(double (&lanes)[lane_count], const F& f, const in_t*... in) {
  static_assert(n % lane_count == 0);
  acc_t terms[n];
  if constexpr (are_bfloat16<in_t...>) {
    const auto keep = [&terms](size_t w, acc_t low, acc_t high) TOLARIA_INLINE_LAMBDA {
      terms[w] = low;
      terms[n / 2 + w] = high;
    };
    for_each_pair<n>(f, keep, in...);
  } else {
    map_pack<acc_t>(terms, f, in...);
  }
  for (size_t start = 0; start < n; start += lane_count) {
    TOLARIA_LANES
    for (size_t l = 0; l < lane_count; ++l) lanes[l] += static_cast<double>(terms[start + l]);
  }
}

}  // namespace tolaria::cpu

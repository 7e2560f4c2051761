// tensor_stats: what one value adds to the sum of squares, the largest magnitude and the count of non-finite values.
#pragma once

#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace tolaria::math {

// A floating dtype as an integer without its sign: ordered like the magnitude, non-finite from `inf` on.
template <typename scalar_t>
struct Magnitude;
template <>
struct Magnitude<double> {
  using bits_t = uint64_t;
  static constexpr bits_t mask = 0x7FFFFFFFFFFFFFFF, inf = 0x7FF0000000000000;
};
template <>
struct Magnitude<float> {
  using bits_t = uint32_t;
  static constexpr bits_t mask = 0x7FFFFFFF, inf = 0x7F800000;
};
template <>
struct Magnitude<c10::Half> {
  using bits_t = uint16_t;
  static constexpr bits_t mask = 0x7FFF, inf = 0x7C00;
};
template <>
struct Magnitude<c10::BFloat16> {
  using bits_t = uint16_t;
  static constexpr bits_t mask = 0x7FFF, inf = 0x7F80;
};

template <typename scalar_t>
inline constexpr bool has_magnitude = std::is_floating_point_v<scalar_t> || std::is_same_v<scalar_t, c10::Half> ||
                                      std::is_same_v<scalar_t, c10::BFloat16>;

template <typename scalar_t>
C10_HOST_DEVICE inline typename Magnitude<scalar_t>::bits_t magnitude_bits(scalar_t value) {
  typename Magnitude<scalar_t>::bits_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits & Magnitude<scalar_t>::mask;
}

template <typename scalar_t>
C10_HOST_DEVICE inline double magnitude_of(typename Magnitude<scalar_t>::bits_t bits) {
  scalar_t value;
  memcpy(static_cast<void*>(&value), &bits, sizeof(bits));
  return static_cast<double>(value);
}

template <typename scalar_t>
C10_HOST_DEVICE inline bool is_finite(scalar_t value) {
  if constexpr (has_magnitude<scalar_t>) {
    return magnitude_bits(value) < Magnitude<scalar_t>::inf;
  } else {
    return true;
  }
}

// A value as it enters the sums: itself, or 0 where it is not finite.
template <typename scalar_t>
C10_HOST_DEVICE inline double finite_or_zero(scalar_t value) {
  const double wide = static_cast<double>(value);
  return is_finite(value) ? wide : 0.0;
}

// The statistics of some values; `merge` makes those of both.
struct Stats {
  double sum_squares = 0;
  double max_abs = 0;
  int64_t nonfinite = 0;

  C10_HOST_DEVICE void merge(const Stats& other) {
    sum_squares += other.sum_squares;
    max_abs = max_abs < other.max_abs ? other.max_abs : max_abs;
    nonfinite += other.nonfinite;
  }
};

// Places in the result of tensor_stats.
enum StatsField : int { kSumSquares, kMaxAbs, kNonfiniteCount, kFirstNonfinite, kStatsFields };

// The norm that a result of tensor_stats tells; NaN if a value was not finite.
C10_HOST_DEVICE inline double norm_of(const double* stats) {
  return stats[kNonfiniteCount] > 0.0 ? std::numeric_limits<double>::quiet_NaN() : std::sqrt(stats[kSumSquares]);
}

}  // namespace tolaria::math

// The largest |value| of a run of bytes, known by the integers that its values are.
#pragma once

#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Float8_e5m2.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <limits>

#include "math/stats.h"

namespace tolaria {

// What the values of a row are; kCheckNone: nobody asks. kZeroed: a capture writes zeros instead of the live bytes, so that
// a restore brings zeros.
enum CheckKind : int64_t {
  kCheckNone = 0,
  kCheckFloat = 1,
  kCheckDouble = 2,
  kCheckHalf = 3,
  kCheckBFloat16 = 4,
  kZeroed = 5,
  kCheckFloat8E4M3 = 6,
  kCheckFloat8E5M2 = 7
};

namespace math {

template <>
struct Magnitude<c10::Float8_e4m3fn> {
  using bits_t = uint8_t;
  static constexpr bits_t mask = 0x7F, inf = 0x7F;  // it has a NaN, and no infinity
};
template <>
struct Magnitude<c10::Float8_e5m2> {
  using bits_t = uint8_t;
  static constexpr bits_t mask = 0x7F, inf = 0x7C;
};

}  // namespace math

// The value behind the largest of some values' bits, whose signs are gone; infinity where one is not finite. So one maximum
// says both, how large a run is and whether it is finite.
struct LargestValue {
  uint64_t bits;
  int64_t check;

  C10_HOST_DEVICE double magnitude() const {
    switch (check) {
      case kCheckFloat: return as<float>();
      case kCheckDouble: return as<double>();
      case kCheckHalf: return as<c10::Half>();
      case kCheckBFloat16: return as<c10::BFloat16>();
      case kCheckFloat8E4M3: return as<c10::Float8_e4m3fn>();
      case kCheckFloat8E5M2: return as<c10::Float8_e5m2>();
      default: return 0.0;
    }
  }

 private:
  template <typename scalar_t>
  C10_HOST_DEVICE double as() const {
    const auto own = static_cast<typename math::Magnitude<scalar_t>::bits_t>(bits);
    return own < math::Magnitude<scalar_t>::inf ? math::magnitude_of<scalar_t>(own)
                                                : std::numeric_limits<double>::infinity();
  }
};

}  // namespace tolaria

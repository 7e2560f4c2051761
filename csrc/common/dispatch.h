// The only dtype switches: a runtime ScalarType becomes scalar_t (storage) and acc_t (arithmetic).
#pragma once

#include <ATen/Dispatch_v2.h>
#include <ATen/OpMathType.h>
#include <c10/core/ScalarType.h>
#include <type_traits>

namespace tolaria {

// The arithmetic of two floating dtypes together: float64 when one of them is, else float32.
inline at::ScalarType acc_type_of(at::ScalarType a, at::ScalarType b) {
  return a == at::kDouble || b == at::kDouble ? at::kDouble : at::kFloat;
}

// Which pairs run in one pass as they are: equal dtypes, and float32 beside half or bfloat16. The rest is promoted.
template <typename a_t, typename b_t>
inline constexpr bool is_fused_pair =
    std::is_same_v<a_t, b_t> || (std::is_same_v<a_t, float> && sizeof(b_t) == 2) ||
    (std::is_same_v<b_t, float> && sizeof(a_t) == 2);

inline bool is_fused_pair_of(at::ScalarType a, at::ScalarType b) {
  const auto is_low = [](at::ScalarType t) { return t == at::kHalf || t == at::kBFloat16; };
  return a == b || (a == at::kFloat && is_low(b)) || (b == at::kFloat && is_low(a));
}

}  // namespace tolaria

// Binds scalar_t and acc_t for float64, float32, half, bfloat16; any other dtype is torch's "not implemented for" error.
#define TOLARIA_DISPATCH(TYPE, NAME, ...)                                  \
  AT_DISPATCH_V2(TYPE, NAME, AT_WRAP([&] {                                 \
                   using acc_t [[maybe_unused]] = at::opmath_type<scalar_t>; \
                   __VA_ARGS__();                                          \
                 }),                                                       \
                 AT_EXPAND(AT_FLOATING_TYPES), at::kHalf, at::kBFloat16)

namespace tolaria {

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls body(host tag, seed tag) for a pair of is_fused_pair. The choice is made in a template: outside of one, `if
// constexpr` compiles the branch not taken, too, and with it kernels for pairs that never run.
template <class Body>
void dispatch_pair(at::ScalarType host_type, at::ScalarType seed_type, const Body& body) {
  const auto run = [&](auto host, auto seed) {
    if constexpr (is_fused_pair<typename decltype(host)::type, typename decltype(seed)::type>) {
      body(host, seed);
    } else {
      TORCH_INTERNAL_ASSERT(false, "dtypes were to be promoted before the kernel");
    }
  };
  TOLARIA_DISPATCH(host_type, "tolaria: host", [&] {
    const TypeTag<scalar_t> host{};
    TOLARIA_DISPATCH(seed_type, "tolaria: seed", [&] { run(host, TypeTag<scalar_t>()); });
  });
}

}  // namespace tolaria

// Binds host_t, seed_t and acc_t for the pairs of is_fused_pair.
#define TOLARIA_DISPATCH_PAIR(HOST_TYPE, SEED_TYPE, ...)                              \
  tolaria::dispatch_pair(HOST_TYPE, SEED_TYPE, [&](auto host_tag, auto seed_tag) {    \
    using host_t = typename decltype(host_tag)::type;                                 \
    using seed_t = typename decltype(seed_tag)::type;                                 \
    using acc_t [[maybe_unused]] = at::opmath_type<host_t>;                           \
    __VA_ARGS__();                                                                    \
  })

// blend: the ends are selected, so that a NaN on the unused side stays out; between them, torch.lerp's two branches.
// alpha <= 0 is the host's end, alpha >= 1 the seed's; a NaN alpha is neither and makes the result NaN.
//
// The branches fuse multiplication and addition, explicitly, as torch.lerp does: where host and seed nearly cancel,
// rounding the product apart would put the result thousands of ulp away from it. std::fma has the same bits everywhere.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>

namespace tolaria::math {

// Where alpha stands; known once for a whole row when alpha does not vary along it.
enum class BlendBranch { kHost, kLow, kHigh, kSeed };

template <typename acc_t>
C10_HOST_DEVICE inline BlendBranch blend_branch(acc_t alpha) {
  if (alpha <= acc_t(0)) return BlendBranch::kHost;
  if (alpha >= acc_t(1)) return BlendBranch::kSeed;
  return alpha < acc_t(0.5) ? BlendBranch::kLow : BlendBranch::kHigh;
}

template <typename acc_t>
C10_HOST_DEVICE inline acc_t blend_low(acc_t host, acc_t seed, acc_t alpha) {
  return std::fma(alpha, seed - host, host);
}

template <typename acc_t>
C10_HOST_DEVICE inline acc_t blend_high(acc_t host, acc_t seed, acc_t alpha) {
  return std::fma(alpha - acc_t(1), seed - host, seed);
}

// One element; written without branches, so that a loop over varying alpha becomes vector selects. Selecting among
// stored values keeps the bits of either end.
template <typename acc_t, typename host_t, typename seed_t>
C10_HOST_DEVICE inline host_t blend(host_t host, seed_t seed, acc_t alpha) {
  const acc_t h = static_cast<acc_t>(host), s = static_cast<acc_t>(seed);
  const acc_t low = blend_low(h, s, alpha), high = blend_high(h, s, alpha);
  const host_t mixed = static_cast<host_t>(alpha < acc_t(0.5) ? low : high);
  const host_t end = alpha >= acc_t(1) ? static_cast<host_t>(seed) : mixed;
  return alpha <= acc_t(0) ? host : end;
}

// The gradients between the ends.
template <typename acc_t>
C10_HOST_DEVICE inline acc_t blend_grad_host_between(acc_t grad, acc_t alpha) {
  return grad * (acc_t(1) - alpha);
}

template <typename acc_t>
C10_HOST_DEVICE inline acc_t blend_grad_seed_between(acc_t grad, acc_t alpha) {
  return grad * alpha;
}

// The gradients: selected as the values are, so a NaN gradient never becomes 0 * NaN on the unused side.
template <typename acc_t, typename host_t>
C10_HOST_DEVICE inline host_t blend_grad_host(host_t grad, acc_t alpha) {
  const host_t mixed = static_cast<host_t>(blend_grad_host_between(static_cast<acc_t>(grad), alpha));
  const host_t end = alpha >= acc_t(1) ? static_cast<host_t>(acc_t(0)) : mixed;
  return alpha <= acc_t(0) ? grad : end;
}

template <typename seed_t, typename acc_t, typename host_t>
C10_HOST_DEVICE inline seed_t blend_grad_seed(host_t grad, acc_t alpha) {
  const seed_t mixed = static_cast<seed_t>(blend_grad_seed_between(static_cast<acc_t>(grad), alpha));
  const seed_t end = alpha >= acc_t(1) ? static_cast<seed_t>(grad) : mixed;
  return alpha <= acc_t(0) ? static_cast<seed_t>(acc_t(0)) : end;
}

// d out / d alpha is that of clamp: 1 on the closed [0, 1], 0 outside (and at NaN).
template <typename acc_t>
C10_HOST_DEVICE inline bool blend_alpha_is_live(acc_t alpha) {
  return alpha >= acc_t(0) && alpha <= acc_t(1);
}

template <typename acc_t>
C10_HOST_DEVICE inline acc_t blend_grad_alpha(acc_t grad, acc_t host, acc_t seed) {
  return grad * (seed - host);
}

// seed_gate's gradient: nothing while alpha <= 0; a NaN alpha lets it through, to be seen.
template <typename acc_t, typename scalar_t>
C10_HOST_DEVICE inline scalar_t seed_gate_grad(scalar_t grad, acc_t alpha) {
  return alpha <= acc_t(0) ? static_cast<scalar_t>(acc_t(0)) : grad;
}

}  // namespace tolaria::math

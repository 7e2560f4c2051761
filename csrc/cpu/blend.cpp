// blend and seed_gate on the CPU: check, lay out, allocate, then one pass on all threads.
#include "math/blend.h"

#include <ATen/ops/empty.h>
#include <cstring>

#include "common/blend_plan.h"
#include "common/checks.h"
#include "common/dispatch.h"
#include "common/fresh.h"
#include "common/layout.h"
#include "cpu/elementwise.h"
#include "cpu/isa.h"
#include "cpu/pack.h"
#include "cpu/stream.h"
#include "ops.h"

namespace tolaria {
namespace {

using cpu::kLanes;
using math::BlendBranch;

template <typename host_t, typename seed_t, typename acc_t>
struct BlendForward {
  const host_t* host_data;
  const seed_t* seed_data;
  host_t* out_data;
  bool is_large;  // write past the caches

  TOLARIA_INLINE void uniform(int64_t, int64_t offset, int64_t n, acc_t alpha) const {
    const host_t* C10_RESTRICT host = host_data + offset;
    const seed_t* C10_RESTRICT seed = seed_data + offset;
    host_t* C10_RESTRICT out = out_data + offset;
    const bool streams = is_large && cpu::is_streamable(out);
    switch (math::blend_branch(alpha)) {
      case BlendBranch::kHost: std::memcpy(out, host, n * sizeof(host_t)); break;
      case BlendBranch::kLow:
        streams ? mixed<true, true>(host, seed, out, n, alpha) : mixed<true, false>(host, seed, out, n, alpha);
        break;
      case BlendBranch::kHigh:
        streams ? mixed<false, true>(host, seed, out, n, alpha) : mixed<false, false>(host, seed, out, n, alpha);
        break;
      case BlendBranch::kSeed: cpu::convert(out, seed, n); break;
    }
  }

  template <bool kIsLow, bool kStreams>
  static TOLARIA_INLINE void mixed(const host_t* C10_RESTRICT host, const seed_t* C10_RESTRICT seed,
                                   host_t* C10_RESTRICT out, int64_t n, acc_t alpha) {
    const auto mix = [alpha = cpu::without_payload(alpha)](acc_t h, acc_t s) TOLARIA_INLINE_LAMBDA {
      return kIsLow ? math::blend_low(h, s, alpha) : math::blend_high(h, s, alpha);
    };
    constexpr int64_t kPack = cpu::kPack<host_t, seed_t>;
    int64_t i = 0;
    for (; i + kPack <= n; i += kPack) {
      cpu::prefetch_pack<kStreams, kPack>(host + i);
      cpu::prefetch_pack<kStreams, kPack>(seed + i);
      alignas(cpu::kLine) host_t mixture[kPack];
      cpu::map_pack<acc_t>(mixture, mix, host + i, seed + i);
      cpu::store_pack<kStreams>(out + i, mixture);
    }
    for (; i < n; ++i) out[i] = static_cast<host_t>(mix(host[i], seed[i]));
    if (kStreams) cpu::stream_fence();
  }

  TOLARIA_INLINE void varied(int64_t, int64_t row, int64_t rows, int64_t mid, int64_t start, int64_t n,
                             const acc_t* C10_RESTRICT alpha) const {
    for (int64_t r = row; r < row + rows; ++r) {
      const host_t* C10_RESTRICT host = host_data + r * mid + start;
      const seed_t* C10_RESTRICT seed = seed_data + r * mid + start;
      host_t* C10_RESTRICT out = out_data + r * mid + start;
      for (int64_t i = 0; i < n; ++i) out[i] = math::blend(host[i], seed[i], alpha[i]);
    }
  }
};

// The gradients of one pass. Null pointers are outputs that nobody asked for. grad_host may be grad's own memory: what is
// read of grad is read before it is written.
template <typename host_t, typename seed_t, typename acc_t>
struct BlendBackward {
  const host_t* grad_data;
  const host_t* host_data;
  const seed_t* seed_data;
  host_t* grad_host;
  seed_t* grad_seed;
  bool is_large;          // write past the caches
  double* alpha_partial;  // one sum per piece, or per (group, mid)
  acc_t* alpha_direct;    // instead, when every element has an alpha of its own

  TOLARIA_INLINE void uniform(int64_t slot, int64_t offset, int64_t n, acc_t alpha) const {
    const bool is_live = alpha_partial != nullptr && math::blend_alpha_is_live(alpha);
    double sum;
    if (alpha <= acc_t(0) || alpha >= acc_t(1)) {
      sum = end(offset, n, alpha, is_live);
    } else {
      sum = is_live ? between<true>(offset, n, alpha) : between<false>(offset, n, alpha);
    }
    if (alpha_partial != nullptr) alpha_partial[slot] = sum;
  }

  // At an end a gradient is grad's bits or zeros.
  TOLARIA_INLINE double end(int64_t offset, int64_t n, acc_t alpha, bool is_live) const {
    const host_t* grad = grad_data + offset;
    if (grad_seed != nullptr && alpha >= acc_t(1)) {
      cpu::convert(grad_seed + offset, grad, n);
    } else if (grad_seed != nullptr) {
      std::memset(static_cast<void*>(grad_seed + offset), 0, n * sizeof(seed_t));
    }
    const double sum = is_live ? pass<true, false>(offset, n, alpha, nullptr, nullptr) : 0;
    if (grad_host != nullptr && alpha >= acc_t(1)) {
      std::memset(static_cast<void*>(grad_host + offset), 0, n * sizeof(host_t));
    } else if (grad_host != nullptr && grad_host != grad_data) {
      std::memcpy(grad_host + offset, grad, n * sizeof(host_t));
    }
    return sum;
  }

  template <bool kAlpha>
  TOLARIA_INLINE double between(int64_t offset, int64_t n, acc_t alpha) const {
    host_t* to_host = grad_host == nullptr ? nullptr : grad_host + offset;
    seed_t* to_seed = grad_seed == nullptr ? nullptr : grad_seed + offset;
    if (is_large && cpu::is_streamable(to_host) && cpu::is_streamable(to_seed)) {
      const double sum = pass<kAlpha, true>(offset, n, alpha, to_host, to_seed);
      cpu::stream_fence();
      return sum;
    }
    return pass<kAlpha, false>(offset, n, alpha, to_host, to_seed);
  }

  // All gradients of a pack before the next one; those without a target go to a pack that nobody reads. Returns the sum
  // of alpha's terms: pack by pack in as many lanes, then the rest.
  template <bool kAlpha, bool kStreams>
  TOLARIA_INLINE double pass(int64_t offset, int64_t n, acc_t alpha, host_t* to_host, seed_t* to_seed) const {
    constexpr int64_t kPack = cpu::kPack<host_t, seed_t>;
    host_t host_sink[kPack];
    seed_t seed_sink[kPack];
    const int64_t host_stride = to_host != nullptr, seed_stride = to_seed != nullptr;
    if (to_host == nullptr) to_host = host_sink;
    if (to_seed == nullptr) to_seed = seed_sink;
    const host_t* grad = grad_data + offset;
    const host_t* host = kAlpha ? host_data + offset : nullptr;
    const seed_t* seed = kAlpha ? seed_data + offset : nullptr;
    alpha = cpu::without_payload(alpha);
    const auto for_host = [alpha](acc_t g) TOLARIA_INLINE_LAMBDA { return math::blend_grad_host_between(g, alpha); };
    const auto for_seed = [alpha](acc_t g) TOLARIA_INLINE_LAMBDA { return math::blend_grad_seed_between(g, alpha); };
    const auto for_alpha = [](acc_t g, acc_t h, acc_t s) TOLARIA_INLINE_LAMBDA { return math::blend_grad_alpha(g, h, s); };
    double lanes[kLanes] = {}, rest = 0;
    int64_t i = 0;
    for (; i + kPack <= n; i += kPack) {
      cpu::prefetch_pack<kStreams, kPack>(grad + i);
      if constexpr (kAlpha) {
        cpu::prefetch_pack<kStreams, kPack>(host + i);
        cpu::prefetch_pack<kStreams, kPack>(seed + i);
      }
      alignas(cpu::kLine) host_t host_pack[kPack];
      alignas(cpu::kLine) seed_t seed_pack[kPack];
      cpu::map_pack<acc_t>(host_pack, for_host, grad + i);
      cpu::map_pack<acc_t>(seed_pack, for_seed, grad + i);
      if constexpr (kAlpha) cpu::add_pack<acc_t, kPack>(lanes, for_alpha, grad + i, host + i, seed + i);
      cpu::store_pack<kStreams>(to_host + i * host_stride, host_pack);
      cpu::store_pack<kStreams>(to_seed + i * seed_stride, seed_pack);
    }
    for (; i < n; ++i) {
      const acc_t g = grad[i];
      if constexpr (kAlpha) rest += static_cast<double>(for_alpha(g, host[i], seed[i]));
      to_host[i * host_stride] = static_cast<host_t>(for_host(g));
      to_seed[i * seed_stride] = static_cast<seed_t>(for_seed(g));
    }
    for (const double lane : lanes) rest += lane;
    return rest;
  }

  TOLARIA_INLINE void varied(int64_t group, int64_t row, int64_t rows, int64_t mid, int64_t start, int64_t n,
                             const acc_t* C10_RESTRICT alpha) const {
    double sums[cpu::kTileWidth];
    std::fill(sums, sums + n, 0.0);
    for (int64_t r = row; r < row + rows; ++r) {
      const int64_t at = r * mid + start;
      const host_t* grad = grad_data + at;
      if (grad_seed != nullptr) seed_row(grad, grad_seed + at, n, alpha);
      if (alpha_direct != nullptr) {
        acc_t* C10_RESTRICT out = alpha_direct + at;
        for (int64_t i = 0; i < n; ++i) out[i] = alpha_term(at + i, alpha[i]);
      } else if (alpha_partial != nullptr) {
        for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(alpha_term(at + i, alpha[i]));
      }
      if (grad_host != nullptr) host_row(grad, grad_host + at, n, alpha);
    }
    if (alpha_partial != nullptr) std::memcpy(alpha_partial + group * mid + start, sums, n * sizeof(double));
  }

  static TOLARIA_INLINE void host_row(const host_t* grad, host_t* out, int64_t n, const acc_t* C10_RESTRICT alpha) {
    TOLARIA_ELEMENTWISE
    for (int64_t i = 0; i < n; ++i) out[i] = math::blend_grad_host(grad[i], alpha[i]);
  }

  static TOLARIA_INLINE void seed_row(const host_t* C10_RESTRICT grad, seed_t* C10_RESTRICT out, int64_t n,
                                      const acc_t* C10_RESTRICT alpha) {
    for (int64_t i = 0; i < n; ++i) out[i] = math::blend_grad_seed<seed_t>(grad[i], alpha[i]);
  }

  TOLARIA_INLINE acc_t alpha_term(int64_t at, acc_t alpha) const {
    const acc_t term = math::blend_grad_alpha<acc_t>(grad_data[at], host_data[at], seed_data[at]);
    return math::blend_alpha_is_live(alpha) ? term : acc_t(0);
  }
};

// The gate's gradient; `out_data` may be grad's own memory.
template <typename scalar_t, typename acc_t>
struct SeedGateBackward {
  const scalar_t* grad_data;
  scalar_t* out_data;

  TOLARIA_INLINE void uniform(int64_t, int64_t offset, int64_t n, acc_t alpha) const {
    if (alpha <= acc_t(0)) {
      std::memset(static_cast<void*>(out_data + offset), 0, n * sizeof(scalar_t));
    } else if (out_data != grad_data) {
      std::memcpy(out_data + offset, grad_data + offset, n * sizeof(scalar_t));
    }
  }

  TOLARIA_INLINE void varied(int64_t, int64_t row, int64_t rows, int64_t mid, int64_t start, int64_t n,
                             const acc_t* C10_RESTRICT alpha) const {
    for (int64_t r = row; r < row + rows; ++r) {
      const scalar_t* grad = grad_data + r * mid + start;
      scalar_t* out = out_data + r * mid + start;
      TOLARIA_ELEMENTWISE
      for (int64_t i = 0; i < n; ++i) out[i] = math::seed_gate_grad(grad[i], alpha[i]);
    }
  }
};

// Runs the op with room for its sums over alpha, and adds them up in a fixed order.
template <typename acc_t, class Op>
at::Tensor run_with_alpha_sums(const AlphaLayout& layout, const at::Tensor& order, const at::Tensor& alpha, Op op) {
  if (!layout.is_uniform() && layout.outer == 1) {
    at::Tensor terms = at::empty({layout.mid}, layout.values.options());
    op.alpha_direct = terms.mutable_data_ptr<acc_t>();
    cpu::for_each_run<acc_t>(layout, op);
    return sums_to_alpha(terms, layout, order, alpha);
  }
  const int64_t rows = layout.is_uniform() ? layout.outer * cpu::UniformPieces(layout).parts
                                           : cpu::VariedTiles(layout).groups;
  const auto options = order.options().dtype(at::kDouble);
  at::Tensor partial = at::empty({rows, layout.mid}, options), sums = at::empty({layout.mid}, options);
  op.alpha_partial = partial.mutable_data_ptr<double>();
  cpu::for_each_run<acc_t>(layout, op);
  cpu::sum_rows(op.alpha_partial, rows, layout.mid, sums.mutable_data_ptr<double>());
  return sums_to_alpha(sums, layout, order, alpha);
}

TensorTriple run_backward(const BlendBackwardPlan& plan, const at::Tensor& alpha) {
  at::Tensor grad_alpha;
  if (plan.order.numel() == 0) {
    if (plan.output_mask[2]) grad_alpha = at::zeros(alpha.sizes(), alpha.options());
    return {plan.grad_host, plan.grad_seed, grad_alpha};
  }
  TOLARIA_DISPATCH_PAIR(plan.grad.scalar_type(), plan.seed_dtype, [&] {
    const BlendBackward<host_t, seed_t, acc_t> op{
        plan.grad.const_data_ptr<host_t>(),
        data_or_null<host_t>(plan.host),
        data_or_null<seed_t>(plan.seed),
        mutable_data_or_null<host_t>(plan.grad_host),
        mutable_data_or_null<seed_t>(plan.grad_seed),
        cpu::outgrows_caches(plan.moved_bytes()),
        nullptr,
        nullptr,
    };
    if (plan.output_mask[2]) {
      grad_alpha = run_with_alpha_sums<acc_t>(plan.layout, plan.order, alpha, op);
    } else {
      cpu::for_each_run<acc_t>(plan.layout, op);
    }
  });
  return {plan.grad_host, plan.grad_seed, grad_alpha};
}

// `out` in its own memory order; it may be `grad` itself.
void run_seed_gate_backward(const at::Tensor& grad, const at::Tensor& alpha, const at::Tensor& out) {
  if (out.numel() == 0) return;
  const at::Tensor g = in_order_of(grad, out, grad.scalar_type());
  const AlphaLayout layout = make_alpha_layout(alpha, out, acc_type_of(grad.scalar_type(), grad.scalar_type()));
  TOLARIA_DISPATCH(grad.scalar_type(), "tolaria::seed_gate_backward", [&] {
    auto* data = out.mutable_data_ptr<scalar_t>();  // first: it makes a lazy copy a real one
    cpu::for_each_run<acc_t>(layout, SeedGateBackward<scalar_t, acc_t>{g.const_data_ptr<scalar_t>(), data});
  });
}

}  // namespace

at::Tensor blend_cpu(const at::Tensor& host, const at::Tensor& seed, const at::Tensor& alpha) {
  check_pair("blend", host, seed);
  check_alpha("blend", alpha, "host", host);
  const auto host_type = host.scalar_type(), seed_type = seed.scalar_type();
  if (!is_fused_pair_of(host_type, seed_type)) return blend_promoted(&blend_cpu, host, seed, alpha);
  const BlendPlan plan(host, seed, alpha);
  if (plan.out.numel() == 0) return plan.out;
  TOLARIA_DISPATCH_PAIR(host_type, seed_type, [&] {
    const BlendForward<host_t, seed_t, acc_t> op{plan.host.const_data_ptr<host_t>(), plan.seed.const_data_ptr<seed_t>(),
                                                 plan.out.mutable_data_ptr<host_t>(),
                                                 cpu::outgrows_caches(plan.moved_bytes())};
    cpu::for_each_run<acc_t>(plan.layout, op);
  });
  return plan.out;
}

TensorTriple blend_backward_cpu(const at::Tensor& grad, const std::optional<at::Tensor>& host,
                                const std::optional<at::Tensor>& seed, const at::Tensor& alpha,
                                at::ScalarType seed_dtype, std::array<bool, 3> output_mask) {
  check_blend_backward(grad, host, seed, alpha, seed_dtype, output_mask);
  if (!is_fused_pair_of(grad.scalar_type(), seed_dtype)) {
    return blend_backward_promoted(&blend_backward_cpu, grad, host, seed, alpha, seed_dtype, output_mask);
  }
  return run_backward({grad, host, seed, alpha, seed_dtype, output_mask}, alpha);
}

TensorPair blend_backward_inplace_cpu(at::Tensor& grad, const std::optional<at::Tensor>& host,
                                      const std::optional<at::Tensor>& seed, const at::Tensor& alpha,
                                      at::ScalarType seed_dtype, std::array<bool, 2> output_mask) {
  const std::array<bool, 3> mask = {true, output_mask[0], output_mask[1]};
  check_blend_backward(grad, host, seed, alpha, seed_dtype, mask);
  if (!is_fused_pair_of(grad.scalar_type(), seed_dtype) || !grad.is_non_overlapping_and_dense()) {
    return blend_backward_by_copy(&blend_backward_cpu, grad, host, seed, alpha, seed_dtype, output_mask);
  }
  auto [grad_host, grad_seed, grad_alpha] =
      run_backward({grad, host, seed, alpha, seed_dtype, mask, /*in_place=*/true}, alpha);
  return {grad_seed, grad_alpha};
}

at::Tensor seed_gate_cpu(const at::Tensor& features, const at::Tensor& alpha) {
  check_floating("seed_gate", "features", features);
  check_alpha("seed_gate", alpha, "features", features);
  return cpu::copy_of(features);
}

at::Tensor seed_gate_backward_cpu(const at::Tensor& grad, const at::Tensor& alpha) {
  check_floating("seed_gate_backward", "grad", grad);
  check_alpha("seed_gate_backward", alpha, "grad", grad);
  at::Tensor out = fresh_like(grad);
  run_seed_gate_backward(grad, alpha, out);
  return out;
}

void seed_gate_backward_inplace_cpu(at::Tensor& grad, const at::Tensor& alpha) {
  check_floating("seed_gate_backward", "grad", grad);
  check_alpha("seed_gate_backward", alpha, "grad", grad);
  if (grad.is_non_overlapping_and_dense()) {
    run_seed_gate_backward(grad, alpha, grad);
  } else {
    grad.copy_(seed_gate_backward_cpu(grad, alpha));
  }
}

}  // namespace tolaria

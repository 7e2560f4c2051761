// Gradients of blend and seed_gate. First derivatives run the fused backward ops; a derivative of those (create_graph) is
// taken through differentiable ATen operations that select as the kernels do.
#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>

#include "autograd/common.h"
#include "common/blend_plan.h"
#include "common/dispatch.h"
#include "ops.h"

namespace tolaria {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor call_blend(const at::Tensor& host, const at::Tensor& seed, const at::Tensor& alpha) {
  static const auto op = find_op("tolaria::blend", &blend_autograd);
  return op.call(host, seed, alpha);
}

TensorTriple call_blend_backward(const at::Tensor& grad, const std::optional<at::Tensor>& host,
                                 const std::optional<at::Tensor>& seed, const at::Tensor& alpha,
                                 at::ScalarType seed_dtype, std::array<bool, 3> output_mask) {
  static const auto op = find_op("tolaria::blend_backward", &blend_backward_autograd);
  return op.call(grad, host, seed, alpha, seed_dtype, output_mask);
}

TensorPair call_blend_backward_(at::Tensor& grad, const std::optional<at::Tensor>& host,
                                const std::optional<at::Tensor>& seed, const at::Tensor& alpha,
                                at::ScalarType seed_dtype, std::array<bool, 2> output_mask) {
  static const auto op = find_op("tolaria::blend_backward_", &blend_backward_inplace_cpu);
  return op.call(grad, host, seed, alpha, seed_dtype, output_mask);
}

at::Tensor call_seed_gate(const at::Tensor& features, const at::Tensor& alpha) {
  static const auto op = find_op("tolaria::seed_gate", &seed_gate_autograd);
  return op.call(features, alpha);
}

at::Tensor call_seed_gate_backward(const at::Tensor& grad, const at::Tensor& alpha) {
  static const auto op = find_op("tolaria::seed_gate_backward", &seed_gate_backward_autograd);
  return op.call(grad, alpha);
}

void call_seed_gate_backward_(at::Tensor& grad, const at::Tensor& alpha) {
  static const auto op = find_op("tolaria::seed_gate_backward_", &seed_gate_backward_inplace_cpu);
  op.call(grad, alpha);
}

struct BlendFunction : torch::autograd::Function<BlendFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& host, const at::Tensor& seed,
                            const at::Tensor& alpha) {
    const bool keeps_features = alpha.requires_grad();  // host and seed matter to grad_alpha alone
    ctx->save_for_backward(keeps_features ? variable_list{alpha, host, seed} : variable_list{alpha});
    if (seed.scalar_type() != host.scalar_type()) {
      ctx->saved_data["seed_dtype"] = static_cast<int64_t>(seed.scalar_type());
    }
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_blend(host, seed, alpha);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return {{}, {}, {}};
    if (grads[0].layout() != at::kStrided) return backward(ctx, {grads[0].to_dense()});
    const variable_list saved = ctx->get_saved_variables();
    const std::array<bool, 3> mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)};
    std::optional<at::Tensor> host, seed;
    if (saved.size() > 1) host = saved[1], seed = saved[2];
    auto seed_dtype = grads[0].scalar_type();
    if (!ctx->saved_data.empty()) seed_dtype = static_cast<at::ScalarType>(ctx->saved_data["seed_dtype"].toInt());
    if (mask[0] && is_ours_alone(grads[0])) {
      at::Tensor grad = grads[0];
      auto [grad_seed, grad_alpha] = call_blend_backward_(grad, host, seed, saved[0], seed_dtype, {mask[1], mask[2]});
      return {grad, grad_seed, grad_alpha};
    }
    auto [grad_host, grad_seed, grad_alpha] = call_blend_backward(grads[0], host, seed, saved[0], seed_dtype, mask);
    return {grad_host, grad_seed, grad_alpha};
  }
};

struct SeedGateFunction : torch::autograd::Function<SeedGateFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& features, const at::Tensor& alpha) {
    ctx->save_for_backward({alpha});
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_seed_gate(features, alpha);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined() || !ctx->needs_input_grad(0)) return {{}, {}};
    if (grads[0].layout() != at::kStrided) return backward(ctx, {grads[0].to_dense()});
    if (is_ours_alone(grads[0])) {
      at::Tensor grad = grads[0];
      call_seed_gate_backward_(grad, ctx->get_saved_variables()[0]);
      return {grad, {}};
    }
    return {call_seed_gate_backward(grads[0], ctx->get_saved_variables()[0]), {}};
  }
};

// The gate's gradient is linear in grad: its own gradient is the gate's again.
struct SeedGateBackwardFunction : torch::autograd::Function<SeedGateBackwardFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& grad, const at::Tensor& alpha) {
    ctx->save_for_backward({alpha});
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_seed_gate_backward(grad, alpha);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return SeedGateFunction::backward(ctx, grads);
  }
};

// blend_backward in differentiable steps. What a selection leaves out, an infinite alpha too, is also masked before the
// products, so that no 0 * inf and no NaN from there reaches a first or second derivative.
TensorTriple differentiable_blend_backward(const at::Tensor& grad, const std::optional<at::Tensor>& host,
                                           const std::optional<at::Tensor>& seed, const at::Tensor& alpha,
                                           at::ScalarType seed_dtype, std::array<bool, 3> output_mask) {
  const auto type = acc_type_of(grad.scalar_type(), seed_dtype);
  const at::Tensor g = grad.to(type), a = alpha.to(type);
  const at::Tensor is_host = a <= 0, is_seed = a >= 1, is_live = (a >= 0).logical_and(a <= 1);
  const at::Tensor is_end = is_host.logical_or(is_seed);
  const at::Tensor between = at::where(is_end, 0, g), weight = at::where(is_end, 0, a);
  at::Tensor grad_host, grad_seed, grad_alpha;
  if (output_mask[0]) {
    grad_host = at::where(is_host, g, between * (1 - weight)).to(grad.scalar_type());
  }
  if (output_mask[1]) {
    grad_seed = at::where(is_seed, g, between * weight).to(seed_dtype);
  }
  if (output_mask[2]) {
    const at::Tensor step = at::where(is_live, seed->to(type), 0) - at::where(is_live, host->to(type), 0);
    grad_alpha = (at::where(is_live, g, 0) * step).sum_to_size(alpha.sizes()).to(alpha.scalar_type());
  }
  return {grad_host, grad_seed, grad_alpha};
}

}  // namespace

at::Tensor blend_autograd(const at::Tensor& host, const at::Tensor& seed, const at::Tensor& alpha) {
  if (is_tracked(host) || is_tracked(seed) || is_tracked(alpha)) return BlendFunction::apply(host, seed, alpha);
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_blend(host, seed, alpha);
}

TensorTriple blend_backward_autograd(const at::Tensor& grad, const std::optional<at::Tensor>& host,
                                     const std::optional<at::Tensor>& seed, const at::Tensor& alpha,
                                     at::ScalarType seed_dtype, std::array<bool, 3> output_mask) {
  if (is_tracked(grad) || is_tracked(host) || is_tracked(seed) || is_tracked(alpha)) {
    return differentiable_blend_backward(grad, host, seed, alpha, seed_dtype, output_mask);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_blend_backward(grad, host, seed, alpha, seed_dtype, output_mask);
}

at::Tensor seed_gate_autograd(const at::Tensor& features, const at::Tensor& alpha) {
  if (is_tracked(features)) return SeedGateFunction::apply(features, alpha);
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_seed_gate(features, alpha);
}

at::Tensor seed_gate_backward_autograd(const at::Tensor& grad, const at::Tensor& alpha) {
  if (is_tracked(grad)) return SeedGateBackwardFunction::apply(grad, alpha);
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_seed_gate_backward(grad, alpha);
}

TensorPair blend_backward_inplace_copied(at::Tensor& grad, const std::optional<at::Tensor>& host,
                                         const std::optional<at::Tensor>& seed, const at::Tensor& alpha,
                                         at::ScalarType seed_dtype, std::array<bool, 2> output_mask) {
  return blend_backward_by_copy(&call_blend_backward, grad, host, seed, alpha, seed_dtype, output_mask);
}

void seed_gate_backward_inplace_copied(at::Tensor& grad, const at::Tensor& alpha) {
  grad.copy_(call_seed_gate_backward(grad, alpha));
}

}  // namespace tolaria

// What both devices prepare before blend's kernels run: operands in one memory order, outputs, alpha's layout.
#pragma once

#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <array>
#include <optional>
#include <tuple>

#include "common/checks.h"
#include "common/dispatch.h"
#include "common/fresh.h"
#include "common/layout.h"

namespace tolaria {

// What a pass over these tensors reads and writes; undefined ones are not there.
template <class... Tensors>
int64_t moved_bytes_of(const Tensors&... tensors) {
  return ((tensors.defined() ? static_cast<int64_t>(tensors.nbytes()) : 0) + ...);
}

struct BlendPlan {
  at::Tensor host, seed, out;
  AlphaLayout layout;

  BlendPlan(const at::Tensor& host_, const at::Tensor& seed_, const at::Tensor& alpha) : out(fresh_like(host_)) {
    if (out.numel() == 0) return;
    host = in_order_of(host_, out, host_.scalar_type());
    seed = in_order_of(seed_, out, seed_.scalar_type());
    layout = make_alpha_layout(alpha, out, acc_type_of(host_.scalar_type(), seed_.scalar_type()));
  }

  int64_t moved_bytes() const { return moved_bytes_of(host, seed, out); }
};

// Tensors that are not needed stay undefined. grad_host is grad's own memory where that is the plan's alone, or where
// `in_place` says that it may be (for a dense grad): fresh memory is the dearest kind.
struct BlendBackwardPlan {
  at::Tensor order, grad, host, seed, grad_host, grad_seed;
  at::ScalarType seed_dtype;
  std::array<bool, 3> output_mask;
  AlphaLayout layout;

  BlendBackwardPlan(const at::Tensor& grad_, const std::optional<at::Tensor>& host_,
                    const std::optional<at::Tensor>& seed_, const at::Tensor& alpha, at::ScalarType seed_dtype_,
                    std::array<bool, 3> mask, bool in_place = false)
      : order(gradient_order(grad_, host_)),
        grad(in_order_of(grad_, order, grad_.scalar_type())),
        seed_dtype(seed_dtype_),
        output_mask(mask) {
    const bool is_ours = in_place || !grad.is_same(grad_);
    if (in_place) grad.mutable_data_ptr();  // a lazy copy becomes a real one now, before its address is taken to be read
    if (mask[0]) grad_host = is_ours ? grad : fresh_like(order);
    if (mask[1]) grad_seed = fresh_like(order, seed_dtype);
    if (grad.numel() == 0) return;
    layout = make_alpha_layout(alpha, order, acc_type_of(grad.scalar_type(), seed_dtype));
    if (mask[2]) {
      host = in_order_of(*host_, order, grad.scalar_type());
      seed = in_order_of(*seed_, order, seed_dtype);
    }
  }

  int64_t moved_bytes() const { return moved_bytes_of(grad, host, seed, grad_host, grad_seed); }
};

// At the host's end the bits of `source` itself: a conversion there and back keeps every value, but not a NaN's payload.
inline at::Tensor with_bits_at_host_end(const at::Tensor& out, const at::Tensor& source, const at::Tensor& alpha,
                                        at::ScalarType type) {
  return out.copy_(at::where(alpha.to(type).le(0), source, out));
}

// Dtypes that no kernel takes together: forward and backward in the type of both, results back in their own.
template <class Blend>
at::Tensor blend_promoted(Blend blend, const at::Tensor& host, const at::Tensor& seed, const at::Tensor& alpha) {
  const auto type = c10::promoteTypes(host.scalar_type(), seed.scalar_type());
  const auto out = blend(host.to(type), seed.to(type), alpha).to(host.scalar_type());
  return with_bits_at_host_end(out, host, alpha, type);
}

template <class Backward>
std::tuple<at::Tensor, at::Tensor, at::Tensor> blend_backward_promoted(
    Backward backward, const at::Tensor& grad, const std::optional<at::Tensor>& host,
    const std::optional<at::Tensor>& seed, const at::Tensor& alpha, at::ScalarType seed_dtype,
    std::array<bool, 3> output_mask) {
  const auto type = c10::promoteTypes(grad.scalar_type(), seed_dtype);
  const auto promoted = [&](const std::optional<at::Tensor>& t) { return t ? std::optional(t->to(type)) : t; };
  auto [grad_host, grad_seed, grad_alpha] =
      backward(grad.to(type), promoted(host), promoted(seed), alpha, type, output_mask);
  if (output_mask[0]) {
    grad_host = with_bits_at_host_end(grad_host.to(grad.scalar_type()), grad, alpha, type);
  }
  if (output_mask[1]) grad_seed = grad_seed.to(seed_dtype);
  return {grad_host, grad_seed, grad_alpha};
}

// The in-place form where a kernel cannot write to grad as it reads it.
template <class Backward>
std::tuple<at::Tensor, at::Tensor> blend_backward_by_copy(Backward backward, at::Tensor& grad,
                                                          const std::optional<at::Tensor>& host,
                                                          const std::optional<at::Tensor>& seed,
                                                          const at::Tensor& alpha, at::ScalarType seed_dtype,
                                                          std::array<bool, 2> output_mask) {
  auto [grad_host, grad_seed, grad_alpha] =
      backward(grad, host, seed, alpha, seed_dtype, {true, output_mask[0], output_mask[1]});
  grad.copy_(grad_host);
  return {grad_seed, grad_alpha};
}

template <typename scalar_t>
const scalar_t* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<scalar_t>() : nullptr;
}

template <typename scalar_t>
scalar_t* mutable_data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<scalar_t>() : nullptr;
}

}  // namespace tolaria

"""``blend`` and ``seed_gate`` in plain PyTorch: the oracle of ``csrc/math/blend.h``, and the fallback.

The ends are selected with ``torch.where``, in both directions: a product with 0 would let a NaN through.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tolaria.reference import _checks


def _like(result: Tensor, model: Tensor) -> Tensor:
    """``result`` in ``model``'s memory layout, never as an operation that may hand back its own operand.

    Where the forward of a Function ends in one (``copy_``, a cast to the same dtype, ``contiguous``),
    ``torch.compile`` of torch 2.11 gives zero gradients and says nothing.
    """
    wanted = torch.empty_like(model)
    return result if result.stride() == wanted.stride() else wanted.copy_(result).clone()


def _readable(op: str, grad: Tensor) -> Tensor:
    """``grad`` as a strided tensor that holds its elements."""
    if torch.compiler.is_compiling():  # may not look at a gradient's layout, and traces strided ones alone
        return grad
    if grad.layout != torch.strided:
        return grad.to_dense()
    _checks.check_memory(op, "grad", grad)
    return grad


def blend_values(host: Tensor, seed: Tensor, alpha: Tensor) -> Tensor:
    """The forward of :func:`blend`, outside autograd."""
    dtype = _checks.arithmetic_dtype(host, seed)
    alpha = alpha.to(dtype)  # first: what rounds to an end is that end, forward and backward
    mixed = torch.lerp(host.to(dtype), seed.to(dtype), alpha).to(host.dtype)
    return _like(torch.where(alpha <= 0, host, torch.where(alpha >= 1, seed.to(host.dtype), mixed)), host)


def blend_backward(
    grad: Tensor,
    host: Tensor | None,
    seed: Tensor | None,
    alpha: Tensor,
    seed_dtype: torch.dtype,
    output_mask: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The three gradients of :func:`blend`, as far as asked for; differentiable itself.

    Args:
        grad: gradient of the result, in the host's dtype.
        host: the host; only for ``grad_alpha``.
        seed: the seed; only for ``grad_alpha``.
        alpha: as in :func:`blend`.
        seed_dtype: dtype of ``grad_seed``.
        output_mask: which of ``(grad_host, grad_seed, grad_alpha)`` to compute; the others are None.
    """
    dtype = torch.float64 if torch.float64 in (grad.dtype, seed_dtype) else torch.float32
    grad = _readable("blend_backward", grad)
    g, a = grad.to(dtype), alpha.to(dtype)
    is_host, is_seed = a <= 0, a >= 1
    is_end = is_host | is_seed  # masked before the products: 0 * inf of an infinite alpha would be NaN
    between, weight = torch.where(is_end, 0.0, g), torch.where(is_end, 0.0, a)
    grad_host = grad_seed = grad_alpha = None
    if output_mask[0]:
        grad_host = torch.where(is_host, grad, (between * (1 - weight)).to(grad.dtype))
    if output_mask[1]:
        grad_seed = torch.where(is_seed, g, between * weight).to(seed_dtype)
    if output_mask[2] and host is not None and seed is not None:
        is_live = (a >= 0) & (a <= 1)
        step = torch.where(is_live, seed.to(dtype), 0.0) - torch.where(is_live, host.to(dtype), 0.0)
        grad_alpha = (torch.where(is_live, g, 0.0) * step).sum_to_size(alpha.shape).to(alpha.dtype)
    return grad_host, grad_seed, grad_alpha


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, host: Tensor, seed: Tensor, alpha: Tensor
    ) -> Tensor:
        keeps_features = ctx.needs_input_grad[2]  # type: ignore[attr-defined]
        ctx.save_for_backward(alpha, *((host, seed) if keeps_features else (None, None)))
        ctx.seed_dtype = seed.dtype  # type: ignore[attr-defined]
        return blend_values(host, seed, alpha)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        alpha, host, seed = ctx.saved_tensors  # type: ignore[attr-defined]
        mask = ctx.needs_input_grad  # type: ignore[attr-defined]
        return blend_backward(grad, host, seed, alpha, ctx.seed_dtype, mask)  # type: ignore[attr-defined]


def check_arguments(host: Tensor, seed: Tensor, alpha: Tensor) -> None:
    """What :func:`blend` accepts.

    Raises:
        TypeError: a layout or dtype is not accepted.
        ValueError: a shape or device does not fit, or memory is missing.
    """
    _checks.check_pair("blend", host, seed)
    _checks.check_alpha("blend", alpha, "host", host)


def blend(host: Tensor, seed: Tensor, alpha: Tensor) -> Tensor:
    """See :func:`tolaria.ops.blend`."""
    check_arguments(host, seed, alpha)
    return _Blend.apply(host, seed, alpha)  # type: ignore[no-any-return,no-untyped-call]


def seed_gate_backward(grad: Tensor, alpha: Tensor) -> Tensor:
    """The gradient behind :func:`seed_gate`: 0 where ``alpha <= 0``, by selection."""
    return _like(_gated(grad, alpha), grad)


def _gated(grad: Tensor, alpha: Tensor) -> Tensor:
    grad = _readable("seed_gate_backward", grad)
    return torch.where(alpha.to(_checks.arithmetic_dtype(grad)) <= 0, 0.0, grad)


class _SeedGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, features: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(alpha)
        return features.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (alpha,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return _gated(grad, alpha), None


def check_gate_arguments(features: Tensor, alpha: Tensor) -> None:
    """What :func:`seed_gate` accepts.

    Raises:
        TypeError: a layout or dtype is not accepted.
        ValueError: a shape or device does not fit, or memory is missing.
    """
    _checks.check_floating("seed_gate", "features", features)
    _checks.check_alpha("seed_gate", alpha, "features", features)


def seed_gate(features: Tensor, alpha: Tensor) -> Tensor:
    """See :func:`tolaria.ops.seed_gate`."""
    check_gate_arguments(features, alpha)
    return _SeedGate.apply(features, alpha)  # type: ignore[no-any-return,no-untyped-call]

"""``blend``, ``seed_gate`` and ``straight_through`` under ``torch.func``: grad, vmap, jvp and their like.

The kernels' autograd nodes are C++, which functorch cannot transform. These are the same values and
derivatives in plain PyTorch, with a forward derivative, which forward-mode AD without ``torch.func`` uses as
well. Memory formats are not kept: a sample of a batch has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tolaria.reference import _checks
from tolaria.reference.blend import blend_backward

_in_transform = torch._C._are_functorch_transforms_active


def are_active() -> bool:
    """Whether a transform of ``torch.func``, or forward-mode AD, is under way, and nobody compiles."""
    return (_in_transform() or forward_ad._current_level >= 0) and not torch.compiler.is_compiling()


def _zeros_for(tangent: Tensor | None, primal: Tensor) -> Tensor:
    return torch.zeros_like(primal) if tangent is None else tangent


class _Transformable(torch.autograd.Function):
    """With derivatives in both directions, made of operations that vmap knows."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ANN401
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


class _Blend(_Transformable):
    @staticmethod
    def forward(host: Tensor, seed: Tensor, alpha: Tensor) -> Tensor:
        dtype = _checks.arithmetic_dtype(host, seed)
        a = alpha.to(dtype)
        mixed = torch.lerp(host.to(dtype), seed.to(dtype), a).to(host.dtype)
        return torch.where(a <= 0, host, torch.where(a >= 1, seed.to(host.dtype), mixed))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # noqa: ANN401
        host, seed, alpha = ctx.saved_tensors
        return blend_backward(grad, host, seed, alpha, seed.dtype, ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, host_t: Tensor | None, seed_t: Tensor | None, alpha_t: Tensor | None) -> Tensor:  # noqa: ANN401
        host, seed, alpha = ctx.saved_tensors
        dtype = _checks.arithmetic_dtype(host, seed)
        a = alpha.to(dtype)
        of_host, of_seed = _zeros_for(host_t, host).to(dtype), _zeros_for(seed_t, seed).to(dtype)
        is_live = (a >= 0) & (a <= 1)
        step = torch.where(is_live, seed.to(dtype), 0.0) - torch.where(is_live, host.to(dtype), 0.0)
        weight = torch.where((a <= 0) | (a >= 1), 0.0, a)
        between = (
            torch.where(a <= 0, 0.0, of_host) * (1 - weight) + torch.where(a >= 1, 0.0, of_seed) * weight
        )
        moved = torch.where(a <= 0, of_host, torch.where(a >= 1, of_seed, between))
        turn = _zeros_for(alpha_t, alpha).to(dtype)
        # an alpha that stands still must not meet a NaN as 0 * NaN
        return (moved + torch.where(is_live & (turn != 0), turn * step, 0.0)).to(host.dtype)


class _SeedGate(_Transformable):
    @staticmethod
    def forward(features: Tensor, alpha: Tensor) -> Tensor:
        return features.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        features, alpha = ctx.saved_tensors
        return _gated(grad, features, alpha), None

    @staticmethod
    def jvp(ctx: Any, features_t: Tensor | None, alpha_t: Tensor | None) -> Tensor:  # noqa: ANN401
        features, alpha = ctx.saved_tensors
        return _gated(_zeros_for(features_t, features), features, alpha)


def _gated(derivative: Tensor, features: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(alpha.to(_checks.arithmetic_dtype(features)) <= 0, 0.0, derivative)


class _StraightThrough(_Transformable):
    @staticmethod
    def forward(host: Tensor, seed: Tensor) -> Tensor:
        return host.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        _, seed = ctx.saved_tensors
        return grad, grad.to(seed.dtype)

    @staticmethod
    def jvp(ctx: Any, host_t: Tensor | None, seed_t: Tensor | None) -> Tensor:  # noqa: ANN401
        host, seed = ctx.saved_tensors
        return _zeros_for(host_t, host) + _zeros_for(seed_t, seed).to(host.dtype)


def blend(host: Tensor, seed: Tensor, alpha: Tensor) -> Tensor:
    """See :func:`tolaria.ops.blend`."""
    _checks.check_pair("blend", host, seed)
    _checks.check_alpha("blend", alpha, "host", host)
    return _Blend.apply(host, seed, alpha)  # type: ignore[no-any-return,no-untyped-call]


def seed_gate(features: Tensor, alpha: Tensor) -> Tensor:
    """See :func:`tolaria.ops.seed_gate`."""
    _checks.check_floating("seed_gate", "features", features)
    _checks.check_alpha("seed_gate", alpha, "features", features)
    return _SeedGate.apply(features, alpha)  # type: ignore[no-any-return,no-untyped-call]


def straight_through(host: Tensor, seed: Tensor) -> Tensor:
    """See :func:`tolaria.ops.straight_through`."""
    _checks.check_pair("straight_through", host, seed)
    return _StraightThrough.apply(host, seed)  # type: ignore[no-any-return,no-untyped-call]

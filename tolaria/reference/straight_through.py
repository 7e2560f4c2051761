"""``straight_through`` in plain PyTorch: the oracle, and the fallback without extension."""

from __future__ import annotations

import torch
from torch import Tensor

from tolaria.reference import _checks


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, host: Tensor, seed: Tensor) -> Tensor:
        ctx.seed_dtype = seed.dtype  # type: ignore[attr-defined]
        return host.clone()  # never a view: an in-place consumer of a view would be forbidden

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        needs_seed = ctx.needs_input_grad[1]  # type: ignore[attr-defined]
        return grad, grad.to(ctx.seed_dtype) if needs_seed else None  # type: ignore[attr-defined]


def straight_through(host: Tensor, seed: Tensor) -> Tensor:
    """See :func:`tolaria.ops.straight_through`."""
    _checks.check_pair("straight_through", host, seed)
    return _StraightThrough.apply(host, seed)  # type: ignore[no-any-return,no-untyped-call]

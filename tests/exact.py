"""What blend must give, worked out in float64: each value with the slack that rounding on the way allows.

A result is right if it lies between the lowest and the highest allowed value, both rounded to its own dtype:
rounding is monotone, so that nothing has to be allowed for the last step, overflow and denormals included.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from strategies import same_bits
from torch import Tensor

F64 = torch.float64


class Exact(NamedTuple):
    """A float64 value and how far from it a result may lie before it is rounded to its dtype."""

    value: Tensor
    slack: Tensor


def arithmetic_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if one of them is, else float32."""
    return F64 if F64 in dtypes else torch.float32


def assert_within(result: Tensor, exact: Exact, what: str) -> None:
    """Every element of ``result`` in its interval; NaN exactly where the exact value is."""
    assert result.shape == exact.value.shape, (what, result.shape, exact.value.shape)
    slack = torch.where(exact.value.isfinite() & exact.slack.isfinite(), exact.slack, 0.0)
    low, high = ((exact.value + sign * slack).to(result.dtype) for sign in (-1, 1))
    found = result.detach().cpu()
    wrong = ~(((low <= found) & (found <= high)) | (found.isnan() & low.isnan()))
    if wrong.any():
        place = int(wrong.flatten().nonzero()[0])
        got, least, most = (t.flatten()[place].item() for t in (found, low, high))
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements wrong, first at {place}: "
            f"got {got!r}, allowed {least!r} to {most!r}"
        )


def blend_exact(
    host: Tensor, seed: Tensor, alpha: Tensor, grad: Tensor, sums_in: torch.dtype = F64
) -> tuple[Exact, Exact, Exact, Exact]:
    """The result of blend and its gradients for host, seed and alpha.

    Args:
        host: as for blend, like ``seed`` and ``alpha``.
        seed: ditto.
        alpha: ditto.
        grad: the incoming gradient.
        sums_in: the dtype in which alpha's terms are added up.
    """
    kind = arithmetic_dtype(host.dtype, seed.dtype)
    info = torch.finfo(kind)
    unit = info.eps / 2 * (1.01 if kind != F64 else 2.5)  # float64 is judged by float64, which errs as much
    tiny = info.smallest_normal * info.eps * (1 if kind != F64 else 4)
    h, s, g = (t.detach().cpu().double() for t in (host, seed, grad))
    a = alpha.detach().cpu().to(kind).double().expand(h.shape)
    is_host, is_seed = a <= 0, a >= 1
    is_end, is_live = is_host | is_seed, (a >= 0) & (a <= 1)
    zero = torch.zeros_like(h)

    change = torch.where(a < 0.5, a, a - 1) * (s - h)
    mixed = torch.where(a < 0.5, h, s) + change
    out = torch.where(is_host, h, torch.where(is_seed, s, mixed))
    out_slack = torch.where(is_end, zero, unit * (2 * change.abs() + mixed.abs()) + tiny)

    to_host = torch.where(is_host, g, torch.where(is_seed, zero, g * (1 - a)))
    to_seed = torch.where(is_seed, g, torch.where(is_host, zero, g * a))
    host_slack, seed_slack = (
        torch.where(is_end, zero, n * unit * t.abs() + tiny) for n, t in ((2, to_host), (1, to_seed))
    )
    terms = torch.where(is_live, g * (s - h), zero)
    count = max(1, h.numel() // max(1, alpha.numel()))
    total, size = terms.sum_to_size(alpha.shape), terms.abs().sum_to_size(alpha.shape)
    rounding = 2 * unit + (count + 8) * torch.finfo(sums_in).eps
    return (
        Exact(out, out_slack),
        Exact(to_host, host_slack),
        Exact(to_seed, seed_slack),
        Exact(total, rounding * size + count * tiny),
    )


NAMES = ("result", "grad_host", "grad_seed", "grad_alpha")


def assert_blend_is_exact(
    host: Tensor,
    seed: Tensor,
    alpha: Tensor,
    grad: Tensor,
    results: Iterable[Tensor | None],
    sums_in: torch.dtype = F64,
) -> None:
    """``results``: (out, grad_host, grad_seed, grad_alpha), None for what was not asked for."""
    exact = blend_exact(host, seed, alpha, grad, sums_in)
    for name, result, wanted in zip(NAMES, results, exact, strict=True):
        if result is not None:
            assert_within(result, wanted, name)


def assert_ends_keep_bits(host: Tensor, seed: Tensor, alpha: Tensor, out: Tensor) -> None:
    """Where alpha is an end, the bits of that end, the sign of a zero included."""
    a = alpha.to(arithmetic_dtype(host.dtype, seed.dtype)).expand(host.shape)
    assert same_bits(out[a <= 0], host[a <= 0])
    assert same_bits(out[a >= 1], seed.to(host.dtype)[a >= 1])

"""Float64 arithmetic of the governor's rule whose every rounding is fixed, as in the C++."""

from __future__ import annotations

import torch
from torch import Tensor


def welford(mean: Tensor, m2: Tensor, x: Tensor, count: Tensor | float) -> tuple[Tensor, Tensor]:
    """One Welford update; ``count`` includes ``x`` (Welford 1962; Knuth, TAOCP 2, 4.2.2)."""
    delta = x - mean
    mean = mean + delta / count
    return mean, m2 + delta * (x - mean)


def _exact_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``a * b`` as an unevaluated sum of two float64 (Dekker 1971), for factors of moderate size."""

    def split(v: Tensor) -> tuple[Tensor, Tensor]:
        scaled = v * 134217729.0  # 2**27 + 1
        high = scaled - (scaled - v)
        return high, v - high

    product = a * b
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def correctly_rounded_sqrt(x: Tensor) -> Tensor:
    """IEEE square root. ``torch.sqrt`` may be off by an ulp: for float64 on x86 it calls a vector library.

    Tuckerman's test picks among the neighbours of its result: ``r`` is the rounded root iff
    ``r * pred(r) < x <= r * succ(r)`` (Markstein 1990).
    """
    mantissa, exponent = torch.frexp(x)
    odd = exponent % 2 != 0
    m = torch.where(odd, mantissa * 2.0, mantissa)
    r = torch.sqrt(m)
    up = torch.nextafter(r, torch.full_like(r, torch.inf))
    down = torch.nextafter(r, torch.zeros_like(r))
    above, above_low = _exact_product(r, up)
    below, below_low = _exact_product(r, down)
    r = torch.where(m - above > above_low, up, torch.where(m - below <= below_low, down, r))
    half = (exponent.to(torch.int64) - odd.to(torch.int64)) // 2  # of a root: the exponent of a normal number
    power = ((half + 1023) << 52).view(torch.float64)  # exact on every device, as `pow` need not be
    return torch.where(torch.isfinite(x) & (x > 0), r * power, torch.sqrt(x))

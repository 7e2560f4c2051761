"""Cross-fade a seed into its host, and gate what a blending seed reads.

Source: csrc/math/blend.h · reference: tolaria.reference.blend · bench: bench/ops/bench_blend.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from tolaria import _backend
from tolaria.reference import _checks, transforms
from tolaria.reference import blend as reference


def blend(host: Tensor, seed: Tensor, alpha: Tensor) -> Tensor:
    """Cross-fade ``host`` into ``seed``: ``lerp(host, seed, clamp(alpha, 0, 1))``, in one pass.

    The ends are selected, never multiplied, forward and backward: at ``alpha <= 0`` the result is the host's
    bits and the seed's gradient is exactly 0, at ``alpha >= 1`` the other way round, whatever the unused
    side or the incoming gradient holds; an infinite alpha is an end. A NaN alpha gives NaN, to be seen. The
    arithmetic is float64 if host or seed is, else float32; alpha is rounded to it first, so that a float64
    alpha of 1e-50 between float32 features is 0, an end. The gradient of alpha is that of ``clamp``: live on
    the closed ``[0, 1]``, summed over what alpha was broadcast over.

    Args:
        host: features, any shape; float32, float64, float16 or bfloat16. Its memory format is kept.
        seed: same shape and device as ``host``; its floating dtype may differ, as under autocast.
        alpha: 0-dim, or any shape that broadcasts to ``host``'s as in NumPy (per sample: ``(B, 1, 1, 1)``),
            any of the four dtypes, on ``host``'s device; it is never fetched to the CPU.

    Returns:
        A new tensor with ``host``'s shape, dtype and memory format.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: an argument is no tensor, or its dtype is none of the four.
    """
    if not (isinstance(host, Tensor) and isinstance(seed, Tensor) and isinstance(alpha, Tensor)):
        _checks.check_tensors("blend", host=host, seed=seed, alpha=alpha)
    if transforms.are_active():
        return transforms.blend(host, seed, alpha)
    if _backend.fused(host):
        try:
            result: Tensor = torch.ops.tolaria.blend.default(host, seed, alpha)
        except NotImplementedError:
            reference.check_arguments(host, seed, alpha)  # names the one that no kernel is for
            raise
        return result
    return reference.blend(host, seed, alpha)


def seed_gate(features: Tensor, alpha: Tensor) -> Tensor:
    """Pass ``features`` to a blending seed; backward, pass its gradient only where ``alpha > 0``.

    A seed that is not in play (``alpha <= 0``: not yet, or dropped by a rollback) then cannot reach the
    host's gradient, not even with a NaN: zeros are selected.

    Args:
        features: any shape; float32, float64, float16 or bfloat16.
        alpha: as for :func:`blend`; it gets no gradient from here.

    Returns:
        A copy of ``features`` in the same memory format.

    Raises:
        ValueError: alpha's shape or device does not fit.
        TypeError: an argument is no tensor, or its dtype is none of the four.
    """
    if not (isinstance(features, Tensor) and isinstance(alpha, Tensor)):
        _checks.check_tensors("seed_gate", features=features, alpha=alpha)
    if transforms.are_active():
        return transforms.seed_gate(features, alpha)
    if _backend.fused(features):
        try:
            result: Tensor = torch.ops.tolaria.seed_gate.default(features, alpha)
        except NotImplementedError:
            reference.check_gate_arguments(features, alpha)
            raise
        return result
    return reference.seed_gate(features, alpha)

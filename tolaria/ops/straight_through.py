"""Train a seed on the host's gradient without letting it touch the forward pass.

Source: csrc/cpu/straight_through.cpp · reference: tolaria.reference.straight_through
bench: bench/ops/bench_straight_through.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from tolaria import _backend
from tolaria.reference import _checks, transforms
from tolaria.reference import straight_through as reference


def straight_through(host: Tensor, seed: Tensor) -> Tensor:
    """Forward: ``host``'s bits, whatever ``seed`` holds. Backward: the gradient to both, unscaled.

    What ``host + (seed - seed.detach())`` is meant to be, without the rounding and without a NaN seed
    reaching the loss. The backward pass moves nothing, unless ``seed``'s dtype differs from ``host``'s. The
    result is fresh memory, so any in-place consumer (``ReLU(inplace=True)``, ``mul_``) is right.

    Args:
        host: features, any shape; float32, float64, float16 or bfloat16. Its memory format is kept.
        seed: same shape and device as ``host``; its floating dtype may differ, as under autocast.

    Returns:
        A new tensor with ``host``'s values, dtype and memory format.

    Raises:
        ValueError: shapes or devices differ.
        TypeError: an argument is no tensor, or its dtype is none of the four.
    """
    if not (isinstance(host, Tensor) and isinstance(seed, Tensor)):
        _checks.check_tensors("straight_through", host=host, seed=seed)
    if transforms.are_active():
        return transforms.straight_through(host, seed)
    if _backend.fused(host):
        try:
            result: Tensor = torch.ops.tolaria.straight_through.default(host, seed)
        except NotImplementedError:
            _checks.check_pair("straight_through", host, seed)  # names the one that no kernel is for
            raise
        return result
    return reference.straight_through(host, seed)

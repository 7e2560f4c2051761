"""Statistics of a whole list of tensors in one pass.

Source: csrc/math/stats.h · reference: tolaria.reference.stats · bench: bench/ops/bench_stats.py
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tolaria import _backend
from tolaria.reference import stats as reference


def tensor_stats(tensors: Iterable[Tensor | None]) -> Tensor:
    """Sum of squares, largest magnitude and non-finite values of a list of tensors, in one pass over it.

    Sums are float64, over the finite values alone, in an order that does not depend on the number of threads.
    Parameters and gradients are read as they are; nothing is differentiated and nothing is moved to the host.

    Args:
        tensors: any number of tensors on one device, of any shape and strides; float32, float64, float16,
            bfloat16, and integers or bool, whose values are all finite. None (a missing gradient) is
            skipped, but has an index.

    Returns:
        float64 ``(4,)`` on the tensors' device (CPU for an empty list): the sum of squares of the finite
        values, the largest finite magnitude, the number of non-finite values, and the index of the first
        tensor that holds one (-1: none).

    Raises:
        TypeError: a tensor is sparse, or complex, or of another dtype that is not listed.
        ValueError: two tensors are on different devices.
    """
    items = tensors if isinstance(tensors, list) else list(tensors)
    first = next((t for t in items if t is not None), None)
    if first is None:
        return torch.tensor([0.0, 0.0, 0.0, -1.0], dtype=torch.float64, device="cpu")
    if not isinstance(first, Tensor):
        kind = type(first).__name__
        raise TypeError(f"tolaria.tensor_stats: tensors: expected Tensors and None, got {kind}")
    if _backend.fused(first):
        try:
            result: Tensor = torch.ops.tolaria.tensor_stats.default(items)
        except RuntimeError:  # NotImplementedError among them
            reference.check_list(items)  # says which entry is no tensor, where that is the matter
            raise
        return result
    return reference.tensor_stats(items)

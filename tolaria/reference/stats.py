"""``tensor_stats`` in plain PyTorch: the oracle of ``csrc/math/stats.h``, and the fallback."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tolaria.reference import _checks

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_list(tensors: Sequence[Tensor | None]) -> list[tuple[int, Tensor]]:
    """The tensors of the list with their places, after checking them.

    Raises:
        TypeError: one is sparse, or of a dtype that is neither floating nor integer nor bool.
        ValueError: two are on different devices.
    """
    kept = [(i, t) for i, t in enumerate(tensors) if t is not None]
    for i, tensor in kept:
        where = f"tolaria.tensor_stats: tensors[{i}]"
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}: expected a Tensor or None, got {type(tensor).__name__}")
        _checks.check_strided(where, tensor)
        is_integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized)
        if not is_integer and tensor.dtype not in _FLOATING:
            raise TypeError(
                f"{where}: expected dtype float32, float64, float16, bfloat16, an integer or bool, "
                f"got {_checks.dtype_name(tensor.dtype)}"
            )
        if tensor.device != kept[0][1].device:
            raise ValueError(
                f"{where}: expected tensors[{kept[0][0]}]'s device {kept[0][1].device}, got {tensor.device}; "
                "call it once for each device"
            )
        _checks.check_memory("tensor_stats", f"tensors[{i}]", tensor)
    return kept


def tensor_stats(tensors: Sequence[Tensor | None]) -> Tensor:
    """See :func:`tolaria.ops.tensor_stats`; looks at the values, so that on CUDA it waits for the device."""
    kept = check_list(tensors)
    device = kept[0][1].device if kept else torch.device("cpu")
    places = [i for i, t in kept if t.numel()]
    values = [t.detach() if t.dtype in _FLOATING else t.double() for _, t in kept if t.numel()]
    if not values:
        return torch.tensor([0.0, 0.0, 0.0, -1.0], dtype=torch.float64, device=device)
    peaks = _stacked(torch._foreach_norm(values, float("inf")))
    poisoned = peaks.isfinite().logical_not_().nonzero().flatten().tolist()
    count = 0
    for k in poisoned:  # rare: only a tensor that holds a non-finite value is looked at again
        finite = values[k].isfinite()
        count += finite.numel() - int(finite.sum())
        values[k] = torch.where(finite, values[k], 0.0)
        peaks[k] = values[k].abs().max().double()
    squares = _stacked(torch._foreach_norm(values, 2, dtype=torch.float64)).square_()
    first = float(places[poisoned[0]]) if poisoned else -1.0
    tail = torch.tensor([float(count), first], dtype=torch.float64, device=device)
    return torch.cat([squares.sum().view(1), peaks.max().view(1), tail])


def _stacked(norms: Sequence[Tensor]) -> Tensor:
    return torch.stack([norm.double() for norm in norms])

"""What the benches run on: sizes, dtypes, layouts, threads, and which of it belongs to ``--quick``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

KIB, MIB = 1 << 10, 1 << 20
SIZES = (KIB, 4 * KIB, 32 * KIB, 128 * KIB, MIB, 8 * MIB, 64 * MIB, 256 * MIB)
_CHANNELS = (64, 8, 8)  # of an image, for channels_last


def named(size: int) -> str:
    """``8 MiB`` for 8388608."""
    for unit, name in ((1 << 30, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size} B"


def sample(tensor: Tensor) -> Tensor:
    """About a million elements from all over it, flat: enough to compare, whatever its size."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() >> 20) | 1]


@dataclass(frozen=True)
class Elementwise:
    """One case of an op on features: what runs, how many bytes a tensor has, and in what form."""

    direction: str
    size: int
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    one_thread: bool = False

    @property
    def longer(self) -> float:
        """How many times longer than others it is measured: headlines more, the largest in three rounds."""
        if self.size > 64 * MIB:
            return 0.1
        return 3 if self.size >= 8 * MIB and self.direction.startswith("both") else 1

    @property
    def name(self) -> str:
        """Its part of a group's name."""
        threads = "1 thread" if self.one_thread else "all threads"
        return f"{self.direction}/{named(self.size)}/{str(self.dtype)[6:]}/{self.layout}/{threads}"

    def tensors(self, count: int, device: str) -> list[Tensor]:
        """``count`` random feature tensors."""
        torch.manual_seed(0)
        numel = self.size // self.dtype.itemsize
        if self.layout == "contiguous":
            return [torch.randn(numel, device=device).to(self.dtype) for _ in range(count)]
        shape = (numel // (64 * 8 * 8), *_CHANNELS)
        form = torch.channels_last
        return [
            torch.randn(shape, device=device).to(self.dtype).contiguous(memory_format=form)
            for _ in range(count)
        ]


def sweep(directions: Sequence[str], quick: Callable[[Elementwise], bool]) -> list[object]:
    """Parameters for a bench: all sizes in the plain form, some in the others, smallest first.

    ``backward`` alone is a part of ``both`` and goes with three sizes; beyond the caches nothing changes from
    64 to 256 MiB but the minutes it takes, and two directions do.
    """
    plain = [Elementwise(d, size) for d, size in itertools.product(directions, SIZES)]
    plain = [case for case in plain if case.size < 256 * MIB or case.direction in ("forward", directions[-1])]
    few = (4 * KIB, 128 * KIB, 8 * MIB)
    plain = [case for case in plain if not case.direction.startswith("backward") or case.size in few]
    others = [
        replace(case, **change)
        for size, change in (
            *((size, {"dtype": torch.bfloat16}) for size in (128 * KIB, 8 * MIB)),
            *((size, {"layout": "channels_last"}) for size in (128 * KIB, 8 * MIB)),
            *((size, {"one_thread": True}) for size in (128 * KIB, 8 * MIB)),
        )
        for case in (Elementwise(d, size) for d in directions if size == 8 * MIB or d in ("forward", "both"))
    ]
    return [
        pytest.param(case, id=case.name, marks=[] if quick(case) else [pytest.mark.slow])
        for case in (*plain, *others)
    ]

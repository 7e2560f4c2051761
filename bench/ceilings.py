"""How fast memory lets a case be: the same reads, writes and allocations, measured beside it.

A case is a list of passes over memory, each with what it reads and what it writes. A ceiling makes the same
passes and computes next to nothing. The *warm* one writes to memory it has written before; the *cold* one to
fresh tensors, as a function that returns new tensors must: their page faults are part of its price.
Candidates are a loop of our own (``ceilings.cpp``; ordinary stores and such as bypass the caches) and torch's
``copy_``, ``add``, ``sum``; the fastest for a case is its ceiling.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from harness import Function
from torch import Tensor

Pass = tuple[Sequence[Tensor], Sequence[Tensor]]
"""What is read, and tensors like those written."""
Mix = Callable[[list[Tensor], list[Tensor]], object]


def _by_torch(reads: list[Tensor], writes: list[Tensor]) -> None:
    """torch's own operators; exact for 1 read + 1 write, 2 + 1 and 1 + 0, close for the others."""
    if not writes:
        for t in reads:
            (t if t.is_cuda or t.numel() % 2 else t.view(torch.float64)).sum()
        return
    if len(reads) == 1:
        for out in writes:
            out.copy_(reads[0])
        return
    torch.add(reads[0], reads[1], out=writes[0])
    for read, out in zip(reads[2:], writes[1:], strict=False):
        out.copy_(read)


@functools.cache
def mixes() -> dict[str, Mix]:
    """The candidates, by name. Our own loop is compiled once a machine; without a compiler torch's remain."""
    from torch.utils import cpp_extension

    found: dict[str, Mix] = {"torch": _by_torch}
    native = [] if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else ["-march=native"]
    try:
        cpp_extension.load(
            "tolaria_bench_ceilings",
            [str(Path(__file__).with_name("ceilings.cpp"))],
            extra_cflags=["-O3", "-g0", "-fopenmp", *native],
            extra_ldflags=["-fopenmp"],
            is_python_module=False,
        )
    except (RuntimeError, OSError) as error:
        print(f"ceilings: torch's operators alone, ceilings.cpp did not build: {str(error).splitlines()[0]}")
        return found
    for name, streaming in (("loop", False), ("streaming loop", True)):
        found[name] = functools.partial(_by_loop, streaming)
    return found


def _by_loop(streaming: bool, reads: list[Tensor], writes: list[Tensor]) -> object:
    return torch.ops.tolaria_bench.mix(reads, writes, streaming)


def _flat(tensor: Tensor) -> Tensor:
    """Memory of as many bytes, as float32. It is written once: untouched pages all are one page of zeros."""
    return torch.ones(max(64, tensor.nbytes // 4), dtype=torch.float32, device=tensor.device)


def _runner(mix: Mix, passes: list[tuple[list[Tensor], list[Tensor]]], cold: bool) -> Function:
    if not cold:

        def run() -> object:
            for reads, writes in passes:
                mix(reads, writes)
            return None
    else:

        def run() -> object:
            kept = []  # all outputs are alive until the end, as a step's are
            for reads, writes in passes:
                fresh = [torch.empty_like(t) for t in writes]
                mix(reads, fresh)
                kept.append(fresh)
            return kept

    return run


def ceilings(passes: Sequence[Pass], *, torch_alone: bool = False) -> dict[str, tuple[str, Function]]:
    """``{"ceiling (warm)": (candidate, function), "ceiling (cold)": ...}``; cold only where it writes."""
    if not passes:
        return {}
    known: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        return known.setdefault(id(tensor), _flat(tensor))

    ours = [([stand_in(t) for t in reads], [_flat(t) for t in writes]) for reads, writes in passes]
    candidates = {"torch": _by_torch} if torch_alone else mixes()
    kinds = [False, True] if any(writes for _, writes in passes) else [False]
    chosen = {}
    for cold in kinds:
        runs = {name: _runner(mix, ours, cold) for name, mix in candidates.items()}
        best = min(runs, key=lambda name: _fastest(runs[name]))
        chosen[f"ceiling ({'cold' if cold else 'warm'})"] = (best, runs[best])
    return chosen


def _fastest(function: Function) -> float:
    function()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)

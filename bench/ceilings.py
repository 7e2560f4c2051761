"""How fast memory lets a case be: the same reads, writes and allocations, measured beside it.

A case is a list of passes over memory, each with what it reads and what it writes. A ceiling makes the same
passes and computes next to nothing. The *warm* one writes to memory it has written before; the *cold* one to
fresh tensors, as a function that returns new tensors must: their page faults are part of its price. Where a
case goes through autograd, a third ceiling is the warm one with a graph of one torch operator on one element
in it: what the engine takes between two passes, with caches full of other things, is nobody's to save.
Candidates are a loop of our own (``ceilings.cpp``; ordinary stores and such as bypass the caches) and torch's
``copy_``, ``add``, ``sum``; the fastest for a case is its ceiling.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
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
    """The candidates, by name. Our own loop is compiled in a second; without a compiler torch's remain."""
    found: dict[str, Mix] = {"torch": _by_torch}
    native = [] if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else ["-march=native"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "ceilings.so"
        command = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-O3", *native, "-fopenmp"]
        command += ["-shared", "-fPIC", str(Path(__file__).with_name("ceilings.cpp")), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            mix = ctypes.CDLL(str(library)).mix
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"ceilings: torch's operators alone, ceilings.cpp did not build: {error}")
            return found
    mix.restype = ctypes.c_bool
    pointers = ctypes.c_void_p
    mix.argtypes = [
        pointers,
        ctypes.c_int,
        pointers,
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_double),
    ]
    for name, streaming in (("loop", 0), ("streaming loop", 1)):
        found[name] = functools.partial(_by_loop, mix, streaming)
    return found


def _by_loop(mix: Callable[..., bool], streaming: int, reads: list[Tensor], writes: list[Tensor]) -> float:
    size, threads, found = reads[0].numel(), torch.get_num_threads(), ctypes.c_double()
    arrays = _addresses(reads), len(reads), _addresses(writes), len(writes)
    if not mix(*arrays, size, threads, streaming, ctypes.byref(found)):
        raise ValueError(f"ceilings.cpp: no pass with {len(reads)} reads and {len(writes)} writes")
    return found.value


def _addresses(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def _flat(tensor: Tensor) -> Tensor:
    """Memory of as many bytes, as float32. It is written once: untouched pages all are one page of zeros."""
    return torch.ones(max(64, tensor.nbytes // 4), dtype=torch.float32, device=tensor.device)


def _in_place(tensor: Tensor) -> Tensor:
    """The very memory of a dense tensor, as float32: large pages or not is a third of a ceiling."""
    if tensor.nbytes < 256 or tensor.nbytes % 4:
        return _flat(tensor)
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.float32)


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


_chosen: dict[object, str] = {}
"""The fastest candidate for passes of these sizes: found once, for every case that makes the same ones."""
_LARGE = 8 << 20
"""Bytes beyond which a pass's size changes nothing."""


def _through_autograd(mix: Mix, passes: list[tuple[list[Tensor], list[Tensor]]]) -> Function:
    first, *others = passes
    one, other = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    grad = torch.ones(1)

    def run() -> object:
        mix(*first)
        found = torch.autograd.grad(one + other, [one, other], grad)
        for reads, writes in others:
            mix(reads, writes)
        return found

    return run


def ceilings(
    passes: Sequence[Pass], *, torch_alone: bool = False, fresh: bool = True, autograd: bool = False
) -> dict[str, tuple[str, Function]]:
    """``{"ceiling (warm)": (candidate, function), "ceiling (cold)": ..., "ceiling (autograd)": ...}``.

    Cold only where the passes write, and with ``fresh`` (what is measured makes new tensors); the last one
    with ``autograd`` (what is measured goes forward and backward through a graph).
    """
    if not passes:
        return {}
    ours = [([_in_place(t) for t in reads], [_flat(t) for t in writes]) for reads, writes in passes]
    candidates = {"torch": _by_torch} if torch_alone else mixes()
    sizes = tuple((len(r), len(w), min(r[0].nbytes, _LARGE)) for r, w in ours)
    chosen = {}
    for cold in [False, True] if fresh and any(writes for _, writes in passes) else [False]:
        runs = {name: _runner(mix, ours, cold) for name, mix in candidates.items()}
        key = (sizes, cold, torch.get_num_threads(), len(runs))
        if key not in _chosen:
            _chosen[key] = min(runs, key=lambda name: _fastest(runs[name]))
        chosen[f"ceiling ({'cold' if cold else 'warm'})"] = (_chosen[key], runs[_chosen[key]])
    if autograd:
        name = chosen["ceiling (warm)"][0]
        chosen["ceiling (autograd)"] = (name, _through_autograd(candidates[name], ours))
    return chosen


def _fastest(function: Function) -> float:
    function()
    times: list[float] = []
    while not times or (len(times) < 5 and sum(times) < 0.05):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)

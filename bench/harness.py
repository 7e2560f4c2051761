"""Timing: implementations of one case side by side, in turn, so that drift favours none."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Function = Callable[[], object]
Timer = Callable[[], float]
"""Runs a batch of calls, returns seconds a call."""


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float
    """For all implementations of a group together."""
    least_rounds: int = 5
    most_rounds: int = 41
    batch_seconds: float = 1e-3
    """Calls shorter than this are timed several at once."""


FULL, QUICK, SMOKE = Effort(1.6), Effort(0.5, most_rounds=21), Effort(0.0, least_rounds=2, batch_seconds=0.0)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads (0: as many as it does)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def once(function: Function) -> float:
    """Seconds of a single call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def calls_for(function: Function, effort: Effort) -> int:
    """How many calls make up a batch that the clock can tell from nothing."""
    seconds = min(once(function) for _ in range(3))
    return max(1, min(5000, math.ceil(effort.batch_seconds / max(seconds, 1e-7))))


def cpu_timer(function: Function, calls: int) -> Timer:
    """A batch on the CPU. A short function runs once before, to find its caches as it would leave them."""

    def run() -> float:
        if calls > 1:
            function()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    return run


def cuda_timer(function: Function, calls: int) -> Timer:
    """A batch between two events: a graph's replay where it can be recorded, else calls one by one."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
        replay: Function = graph.replay
    except RuntimeError:  # what reads the device cannot be recorded: its waiting is part of its price
        torch.cuda.synchronize()

        def replay() -> None:
            for _ in range(calls):
                function()

    def run() -> float:
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return run


def interleaved(
    functions: Mapping[str, Function], effort: Effort, device: str = "cpu"
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds a call of each function in each round, and the calls of a batch.

    Every round times every function once. The round's first is another one each time, and every second round
    runs backwards, so that no function always follows the same one.
    """
    calls = {name: calls_for(function, effort) for name, function in functions.items()}
    make = cuda_timer if device == "cuda" else cpu_timer
    timers = {name: make(function, calls[name]) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        began, number = time.perf_counter(), 0
        while number < effort.least_rounds or (
            number < effort.most_rounds and time.perf_counter() - began < effort.seconds
        ):
            turn = number % len(names)
            order = names[turn:] + names[:turn]
            for name in order[:: -1 if number % 2 else 1]:
                samples[name].append(timers[name]())
            number += 1
    finally:
        if enabled:
            gc.enable()
    return samples, calls

"""Timing: implementations of one case side by side, in turn, so that drift favours none."""

from __future__ import annotations

import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

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

    def times(self, factor: float) -> Effort:
        """As much more for a case that needs it, or less."""
        return replace(
            self,
            seconds=factor * self.seconds,
            least_rounds=self.least_rounds if factor >= 1 else min(3, self.least_rounds),
            most_rounds=max(3, round(factor * self.most_rounds)),
        )


FULL, QUICK, SMOKE = Effort(0.8), Effort(0.4, most_rounds=25), Effort(0.0, least_rounds=2, batch_seconds=0.0)
PATIENCE = 5
"""How many times slower than the first of its group something may be and still take part in every round."""


@contextmanager
def no_collection() -> Iterator[None]:
    """Without the garbage collector, whose pauses would hit anyone."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads (0: as many as it does)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def once(function: Function, device: str = "cpu") -> float:
    """Seconds of a single call."""
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def calls_for(
    function: Function, effort: Effort, device: str = "cpu", known: float = 0.0
) -> tuple[int, float]:
    """How many calls make up a batch that the clock can tell from nothing, and the seconds it will take."""
    seconds = known if known > 0.05 else once(function, device)
    if seconds < 0.05:
        seconds = min(seconds, once(function, device), once(function, device))
    calls = max(1, min(5000, math.ceil(effort.batch_seconds / max(seconds, 1e-7))))
    return calls, calls * seconds


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


def orders(names: Sequence[str]) -> Iterator[list[str]]:
    """The order of each round: everyone begins in turn, and nobody always follows the same one."""
    shuffle = random.Random(0)
    for number in itertools.count():
        first = names[number % len(names)]
        others = [name for name in names if name != first]
        yield [first, *shuffle.sample(others, len(others))]


def interleaved(
    functions: Mapping[str, Function],
    effort: Effort,
    device: str = "cpu",
    known: Mapping[str, float] | None = None,
) -> tuple[dict[str, list[float | None]], dict[str, int]]:
    """Seconds a call of each function in each round, and the calls of a batch. The first one is ours.

    Every round times the functions in an order of its own. What is slow and far slower than ours sits out
    most rounds after the second: None. ``known``: seconds that a call took before.
    """
    sized = {
        name: calls_for(function, effort, device, (known or {}).get(name, 0.0))
        for name, function in functions.items()
    }
    calls = {name: count for name, (count, _) in sized.items()}
    ours = next(iter(sized.values()))[1]
    pauses = {
        name: max(1, min(8, int(seconds / (PATIENCE * ours)))) if seconds > 0.1 else 1
        for name, (_, seconds) in sized.items()
    }
    make = cuda_timer if device == "cuda" else cpu_timer
    timers = {name: make(function, calls[name]) for name, function in functions.items()}
    samples: dict[str, list[float | None]] = {name: [] for name in functions}
    turns = orders(list(functions))
    with no_collection():
        began, number = time.perf_counter(), 0
        while number < effort.least_rounds or (
            number < effort.most_rounds and time.perf_counter() - began < effort.seconds
        ):
            for name in next(turns):
                takes_part = number < 2 or number % pauses[name] == 0
                samples[name].append(timers[name]() if takes_part else None)
            number += 1
    return samples, calls

"""Whole training steps, guarded and not; the stall of a capture, the time of a rollback.

A round trains each copy for a few steps in a row, as a loop does that has one model, the copies in an order
drawn anew. All start alike and see the same batch. What the governor costs is the difference of medians of
one round: noise that lasts longer than a round cancels. The unguarded network is there twice: how far the
two are apart is what a difference means nothing below. All is built anew a few times, in another order, so
that no copy owes its time to its place in memory.
A capture happens in few steps and is looked at on its own; the overhead at an interval is that of a clean
step, and a capture's divided by the interval.
"""

from __future__ import annotations

import copy
import random
import time

import numpy as np
import pytest
import torch
from harness import FULL, QUICK, SMOKE, interleaved, no_collection, orders
from models import WORKLOADS, Trainee
from summary import median_difference

import tolaria
from tolaria import GovernorConfig, TolariaGovernor
from tolaria.ops import StatusField


class Guarded(Trainee):
    """A copy with a governor; keeps how long each ``governor.step`` took and whether it captured."""

    def __init__(self, workload, device, *, interval, backend="auto", **settings):
        super().__init__(workload, device)
        self.backend = backend
        config = GovernorConfig(snapshot_interval=interval, **settings)
        with tolaria.backend(backend):
            self.governor = TolariaGovernor(self.model, self.optimizer, config=config)
        self.stalls, self.captured = [], []
        self.captures = 0

    def step(self):
        loss = super().step()
        if self.backend == "auto":
            start = time.perf_counter()
            self.governor.step(loss)
        else:
            with tolaria.backend(self.backend):
                start = time.perf_counter()
                self.governor.step(loss)
        self.stalls.append(time.perf_counter() - start)
        captures = self.governor._attached.row.reader.status(StatusField.due_from)
        self.captured.append(captures != self.captures)
        self.captures = captures
        return loss


WAYS = {
    "unguarded": lambda workload, device: Trainee(workload, device),
    "unguarded again": lambda workload, device: Trainee(workload, device),
    "fused": lambda workload, device: Guarded(workload, device, interval=100),
    "every 10": lambda workload, device: Guarded(workload, device, interval=10),
    "reference": lambda workload, device: Guarded(workload, device, interval=100, backend="reference"),
}
SLOW = {"reference": 4}
"""Takes part in every fourth round."""


def timed_steps(way, workload, device):
    """Seconds of the timed steps of one block; on CUDA a step ends when the device is done."""
    seconds = []
    for number in range(workload.settling + workload.timed):
        start = time.perf_counter()
        way.step()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= workload.settling:
            seconds.append(time.perf_counter() - start)
    return seconds


class Blocks:
    """What one way to train took: ``seconds``, ``stalls`` and ``captured``, each ``(rounds, timed)``."""

    def __init__(self):
        self.seconds, self.stalls, self.captured = [], [], []

    def add(self, way, seconds):
        self.seconds.append(seconds)
        for kept, found in ((self.stalls, "stalls"), (self.captured, "captured")):
            kept.append(getattr(way, found, [0] * len(seconds))[-len(seconds) :])

    def skip(self, timed):
        self.seconds.append([np.nan] * timed)
        self.stalls.append([np.nan] * timed)
        self.captured.append([0] * timed)

    def clean(self, values):
        """``values`` without those of steps that captured, as NaN."""
        return np.where(np.asarray(self.captured, bool), np.nan, np.asarray(values))

    def medians(self):
        """Of each round's clean steps; NaN for a round without one."""
        clean = self.clean(self.seconds)
        return np.array([np.nan if np.isnan(row).all() else np.nanmedian(row) for row in clean])


def rounds_of(ways, found, workload, rounds, device):
    """Train all ``ways`` for some rounds and add what they took to ``found``."""
    turns = orders(list(ways))
    with no_collection():
        for number in range(rounds):
            for name in next(turns):
                if number % SLOW.get(name, 1) == 0:
                    found[name].add(ways[name], timed_steps(ways[name], workload, device))
                else:
                    found[name].skip(workload.timed)


def costs(found, plain, step, capture=None):
    """What a guarded way adds to a step, as the JSON's extra information."""
    gaps = found.medians() - plain
    clean = median_difference(gaps, np.zeros(len(gaps)))
    seconds, stalls, captured = (np.asarray(x) for x in (found.seconds, found.stalls, found.captured))
    captured = captured.astype(bool)
    info = {"clean_gap": [clean.value, clean.low, clean.high], "step_seconds": step}
    info["stall_clean"] = float(np.nanmedian(found.clean(stalls)))
    info["stall_capture"] = float(np.median(stalls[captured])) if captured.any() else None
    if captured.any():
        info["capture"] = float(np.median((seconds - plain[:, None])[captured])) - clean.value
    capture = info.get("capture", 0.0) if capture is None else capture
    for interval in (10, 100):
        bounds = (clean.value, clean.low, clean.high)
        values = [100 * (bound + capture / interval) / step for bound in bounds]
        direct = info["stall_clean"] + (info["stall_capture"] or 0.0) / interval
        info[f"overhead_percent_{interval}"] = values[0]
        info[f"overhead_interval_{interval}"] = values[1:]
        info[f"direct_percent_{interval}"] = 100 * direct / step
    return info


@pytest.mark.parametrize("name", list(WORKLOADS))
def bench_step(name, record, effort, device):
    workload = WORKLOADS[name]
    found = {way: Blocks() for way in WAYS}
    rounds = {FULL: workload.rounds, QUICK: workload.quick_rounds, SMOKE: 2}[effort]
    builds = {FULL: 3, QUICK: 2 if workload.settling else 1, SMOKE: 1}[effort]
    for build in range(builds):
        order = random.Random(build).sample(list(WAYS), len(WAYS))
        ways = {way: WAYS[way](workload, device) for way in order}
        for way in ways.values():
            way.step()
        parts = [[p.detach() for p in way.model.parameters()] for way in ways.values()]
        assert all(torch.equal(a, b) for other in parts[1:] for a, b in zip(parts[0], other, strict=True))
        for _ in range(0 if effort is SMOKE else 7 - workload.timed):
            ways["every 10"].step()  # so that a capture falls into few rounds
        rounds_of(ways, found, workload, -(-rounds // builds), device)
    both = [found[way].medians() for way in ("unguarded", "unguarded again")]
    plain = np.mean(both, axis=0)
    step = float(np.median(plain))
    noise = median_difference(both[1], both[0])
    often = costs(found["every 10"], plain, step)
    for way, blocks in found.items():
        samples = [None if np.isnan(x) else x for x in np.ravel(blocks.seconds)]
        info = {"device": device, "threads": torch.get_num_threads(), "moved_bytes": 0}
        if way == "unguarded":
            info["noise"] = [noise.value, noise.low, noise.high]
        elif way != "unguarded again":
            info |= costs(blocks, plain, step, None if way == "reference" else often.get("capture"))
        record(f"step/{name}", way, samples, **info)
    clean = found["fused"].clean(found["fused"].stalls).ravel()
    loop = f"governor.step/{name}/clean, in the loop"
    stalls = clean[~np.isnan(clean)].tolist()
    record(loop, "fused", stalls, step_seconds=step, moved_bytes=0, absent={})


def clean_steps(name, device, backend):
    """``governor.step`` on a loss that stays, with no capture due."""
    guarded = Guarded(WORKLOADS[name], device, interval=10**9, backend=backend)
    loss = guarded.step()
    governor = guarded.governor
    if backend == "auto":
        return lambda: governor.step(loss)

    def run():
        with tolaria.backend(backend):
            governor.step(loss)

    return run


@pytest.mark.parametrize("name", ["digits CNN", "resnet18"])
def bench_clean_governor_step(name, record, effort, device):
    functions = {
        "fused": clean_steps(name, device, "auto"),
        "reference": clean_steps(name, device, "reference"),
    }
    samples, calls = interleaved(functions, effort, device)
    for impl, seconds in samples.items():
        record(f"governor.step/{name}/clean, alone", impl, seconds, calls[impl], moved_bytes=0)


@pytest.mark.parametrize("name", list(WORKLOADS))
def bench_rollback(name, record, effort, device):
    """A capture and a rollback as the user calls them, bookkeeping included, beside what people write."""
    often = 10**9
    guarded = Guarded(
        WORKLOADS[name], device, interval=often, max_rollbacks=often, max_restores_of_one_capture=often
    )
    loss = guarded.step()
    governor, model, optimizer = guarded.governor, guarded.model, guarded.optimizer
    before = [p.detach().clone() for p in model.parameters()]
    governor.snapshot()
    for _ in range(3):
        governor.step(loss)  # on probation, then promoted
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    governor.execute_rollback()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    def rollback():
        governor.step(loss)  # so that there is something to roll back; its microseconds are included
        governor.execute_rollback()

    def clone():
        return {k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(optimizer.state_dict())

    saved = clone()

    def load():
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))  # it keeps what it is given, and would train it

    ways = {
        "capture": {"fused": governor.snapshot, "clone + deepcopy": clone},
        "rollback": {"fused": rollback, "load_state_dict": load},
    }
    moved = 2 * governor._engine.slots.table.nbytes
    for kind, functions in ways.items():
        samples, calls = interleaved(functions, effort, device)
        for impl, seconds in samples.items():
            record(f"{kind}/{name}", impl, seconds, calls[impl], moved_bytes=moved)

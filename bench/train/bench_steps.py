"""Whole training steps, guarded and not, in turn; the stall of a capture, the time of a rollback.

Every round makes one step of each way to train, on copies that start alike and see the same batch. What the
governor costs is the difference of two steps of one round: noise that lasts longer than a round cancels.
A capture happens in few rounds and is looked at on its own; the overhead at an interval is that of a clean
step, and a capture's divided by the interval.
"""

from __future__ import annotations

import copy
import gc
import time

import numpy as np
import pytest
import torch
from harness import SMOKE, interleaved
from memory import peak_of
from models import WORKLOADS, Trainee
from summary import median_difference

import tolaria
from tolaria import GovernorConfig, TolariaGovernor
from tolaria.ops import StatusField


class Guarded(Trainee):
    """A copy with a governor; keeps how long each ``governor.step`` took and whether it captured."""

    def __init__(self, workload, device, *, interval, backend="auto"):
        super().__init__(workload, device)
        self.backend = backend
        with tolaria.backend(backend):
            self.governor = TolariaGovernor(
                self.model, self.optimizer, config=GovernorConfig(snapshot_interval=interval)
            )
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
        captures = self.governor._reader.status(StatusField.anchor_step)
        self.captured.append(captures != self.captures)
        self.captures = captures
        return loss


def in_turn(ways, rounds, device):
    """Seconds of every step of every way, round by round; on CUDA a step ends when the device is done."""
    samples = {name: [] for name in ways}
    names = list(ways)
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                start = time.perf_counter()
                ways[name].step()
                if device == "cuda":
                    torch.cuda.synchronize()
                samples[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return samples


def overheads(plain, guarded, samples):
    """What the governor adds to a clean step and, on top, to one that captures (seconds, with intervals)."""
    gaps = np.asarray(samples) - np.asarray(plain)
    captured = np.asarray(guarded.captured[-len(gaps) :])
    clean = median_difference(gaps[~captured], np.zeros((~captured).sum()))
    capture = None
    if captured.any():
        capture = float(np.median(gaps[captured])) - clean.value
    return clean, capture


@pytest.mark.parametrize("name", list(WORKLOADS))
def bench_step(name, record, effort, device):
    workload = WORKLOADS[name]
    ways = {
        "unguarded": Trainee(workload, device),
        "fused": Guarded(workload, device, interval=100),
        "every 10": Guarded(workload, device, interval=10),
        "reference": Guarded(workload, device, interval=100, backend="reference"),
    }
    for way in ways.values():
        for _ in range(3):
            way.step()
    parts = [[p.detach() for p in way.model.parameters()] for way in ways.values()]
    assert all(torch.equal(a, b) for other in parts[1:] for a, b in zip(parts[0], other, strict=True))
    rounds = workload.rounds if effort.seconds > 1 else workload.quick_rounds
    samples = in_turn(ways, 3 if effort is SMOKE else rounds, device)
    plain = samples["unguarded"]
    step = float(np.median(plain))
    _, capture = overheads(plain, ways["every 10"], samples["every 10"])
    for impl, way in ways.items():
        info = {"device": device, "threads": torch.get_num_threads(), "moved_bytes": 0}
        if isinstance(way, Guarded):
            clean, own = overheads(plain, way, samples[impl])
            kept = range(-len(plain), 0)
            stalls = {
                kind: [way.stalls[i] for i in kept if way.captured[i] == (kind == "capture")]
                for kind in ("clean", "capture")
            }
            own = capture if own is None else own
            info["clean_gap"] = [clean.value, clean.low, clean.high]
            info["stall_clean"] = float(np.median(stalls["clean"]))
            info["stall_capture"] = float(np.median(stalls["capture"])) if stalls["capture"] else None
            for interval in (10, 100):
                cost = clean.value + (own or 0.0) / interval
                direct = info["stall_clean"] + (info["stall_capture"] or 0.0) / interval
                info[f"overhead_percent_{interval}"] = 100 * cost / step
                info[f"direct_percent_{interval}"] = 100 * direct / step
            if impl == "fused":
                loop = f"governor.step/{name}/clean, in the loop"
                record(loop, "fused", stalls["clean"], step_seconds=step, moved_bytes=0, absent={})
        record(f"step/{name}", impl, samples[impl], **info)


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
    guarded = Guarded(WORKLOADS[name], device, interval=10**9)
    loss = guarded.step()
    governor, model, optimizer = guarded.governor, guarded.model, guarded.optimizer
    governor.config = governor.config.replace(max_rollbacks=10**9)
    governor._policy._config = governor.config
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


@pytest.mark.parametrize("name", list(WORKLOADS))
def bench_memory(name, record, device):
    """Peak memory of five steps, guarded and not; the times beside the bytes mean nothing."""
    for impl in ("unguarded", "fused"):
        found = peak_of(name, guarded=impl == "fused", device=device)
        record(f"memory/{name}", impl, [found.pop("seconds")], moved_bytes=0, **found)

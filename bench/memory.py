"""Peak memory of a few training steps, each workload in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

Peaks = dict[str, float]


def start(names: Sequence[str], device: str) -> subprocess.Popen[str]:
    """Begin to measure workloads beside whatever runs meanwhile; :func:`peaks` reads what it prints.

    A process of its own each, since a peak never falls. They are forked by one that has imported everything
    and run nothing yet: what they have in common is the same for all.
    """
    command = [sys.executable, str(Path(__file__).resolve()), device, *names]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # finds what this one finds
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=paths)


def peaks(running: subprocess.Popen[str]) -> dict[str, dict[str, Peaks]]:
    """By workload and by ``unguarded`` or ``fused``: seconds, peak; guarded: state and slots, too."""
    printed, _ = running.communicate()
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, running.args, printed)
    found: dict[str, dict[str, Peaks]] = json.loads(printed.splitlines()[-1])
    return found


def _peak(device: str) -> float:
    """Bytes: the largest resident size of this process, on CUDA of the allocator."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    try:  # not ru_maxrss, which a process takes over from the one that started it
        with open("/proc/self/status") as lines:
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(name: str, guarded: bool, device: str) -> Peaks:
    """Train a little."""
    from models import WORKLOADS, Trainee

    from tolaria import GovernorConfig, TolariaGovernor

    start = time.perf_counter()
    trainee = Trainee(WORKLOADS[name], device)
    found: Peaks = {}
    governor = None
    if guarded:
        settings = GovernorConfig(snapshot_interval=3)
        governor = TolariaGovernor(trainee.model, trainee.optimizer, config=settings)
    for _ in range(5):  # a capture is among them
        loss = trainee.step()
        if governor is not None:
            governor.step(loss)
    if governor is not None:
        slots = governor._engine.slots
        found |= {"state_bytes": slots.table.nbytes, "slot_bytes": slots.nbytes}
    return {**found, "peak_bytes": _peak(device), "seconds": time.perf_counter() - start}


def main(device: str, names: Sequence[str]) -> None:
    """Print the figures of these workloads."""
    import models  # noqa: F401

    import tolaria  # noqa: F401

    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports more, too
    fork = multiprocessing.get_context("fork")
    found: dict[str, dict[str, Peaks]] = {}
    for name in names:
        for impl in ("unguarded", "fused"):
            with fork.Pool(1) as alone:
                found.setdefault(name, {})[impl] = alone.apply(measured, (name, impl == "fused", device))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

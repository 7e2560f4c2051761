"""Peak memory of a few training steps, in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch


def peak_of(name: str, *, guarded: bool, device: str) -> dict[str, float]:
    """``seconds``, ``peak_bytes``, and for a guarded run ``state_bytes`` and ``slot_bytes``.

    A process of its own, since a peak never falls: the largest resident size, on CUDA of the allocator.
    """
    command = [sys.executable, str(Path(__file__).resolve()), name, str(int(guarded)), device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(name: str, guarded: bool, device: str) -> None:
    """Train a little and print the figures."""
    from models import WORKLOADS, Trainee

    from tolaria import GovernorConfig, TolariaGovernor

    start = time.perf_counter()
    trainee = Trainee(WORKLOADS[name], device)
    found: dict[str, float] = {}
    governor = None
    if guarded:
        settings = GovernorConfig(snapshot_interval=3)
        governor = TolariaGovernor(trainee.model, trainee.optimizer, config=settings)
    for _ in range(5):
        loss = trainee.step()
        if governor is not None:
            governor.step(loss)
    if governor is not None:
        slots = governor._engine.slots
        found |= {"state_bytes": slots.table.nbytes, "slot_bytes": slots.nbytes}
    if device == "cuda":
        torch.cuda.synchronize()
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    else:
        found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": time.perf_counter() - start, **found}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "1", sys.argv[3])

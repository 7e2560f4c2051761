"""Kills training runs that save beside training, at random moments, and goes on from what they left.

    PYTHONPATH=. python tests/kill_storm.py [--kills 200] [--seed 0] [--folder FOLDER]

Each time: a process trains with ``save_every=1`` and is killed with SIGKILL; what its folder holds must load,
and a run that goes on from it must be, bit for bit, the run that nobody killed. Exit status 1 if one was not.
The suite runs a few (tests/governor/test_killed.py).
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from tolaria import GovernorConfig, SnapshotError, TolariaGovernor, load_snapshot

STEPS = 400
WIDTH = 96


class Run:
    """A small network with everything that draws random numbers or counts."""

    def __init__(self, folder: Path | None = None) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(32, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.2), nn.ReLU(), nn.Linear(WIDTH, 4)
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 3e-3, total_steps=STEPS + 1)
        saves = {"save_every": 1, "save_path": str(folder)} if folder is not None else {}
        config = GovernorConfig(snapshot_interval=5, probation=2, **saves)
        self.governor = TolariaGovernor(
            self.model, self.optimizer, config=config, schedulers=[self.schedule], num_classes=4
        )

    def train(self, steps: int) -> list[float]:
        """The losses of so many steps."""
        losses = []
        for _ in range(steps):
            loss = nn.functional.cross_entropy(self.model(torch.randn(16, 32)), torch.randint(4, (16,)))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.governor.step(loss)
            losses.append(loss.item())
        return losses


def in_a_child(work: Callable[[], None]) -> int:
    """Do ``work`` in a forked process; returns its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def storm(kills: int, seed: int, folder: Path) -> tuple[list[str], int]:
    """Kill so many runs.

    Returns:
        What went wrong, and how many left nothing, having been killed before the first save was whole.
    """
    torch.set_num_threads(1)  # a forked child has no other
    draws, wrong, empty = random.Random(seed), [], 0
    began = time.monotonic()
    expected = Run().train(STEPS)
    longest = time.monotonic() - began
    for number in range(kills):
        target = folder / f"run_{number}"
        child = in_a_child(lambda target=target: Run(target).train(STEPS) and None)  # type: ignore[misc]
        time.sleep(draws.uniform(0.02, longest * 0.9))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            resumed = Run()
            step = load_snapshot(target, resumed.governor)["step"]
        except SnapshotError as error:
            left = sorted(path.name for path in target.glob("step_*")) if target.exists() else []
            empty += not left
            wrong += [f"kill {number}: {error}"] if left else []
            continue
        if resumed.train(STEPS - step) != expected[step:]:
            wrong.append(f"kill {number}: the run that went on from step {step} is another")
        shutil.rmtree(target)
    return wrong, empty


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs save, for instance in tmpfs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        wrong, empty = storm(options.kills, options.seed, Path(folder))
    print(*wrong, f"{options.kills} kills, {empty} before the first save, {len(wrong)} wrong", sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

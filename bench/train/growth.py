"""Does growing pay? The grown network against its host alone, paired by seed.

    python bench/train/growth.py --task digits --seeds 5

Three runs per seed, from the same weights and the same order of data: grown; host alone for as many steps;
host alone for as many steps as fit into the time that the grown run took. Time is the process's own, so that
a busy machine favours neither; validation during the run is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from dataclasses import dataclass

import torch

from tolaria import get_task
from tolaria.tasks import TrainSettings
from tolaria.train import grow


@dataclass(frozen=True)
class Run:
    """One training run."""

    steps: int
    seconds: float
    loss: float
    accuracy: float


def train(task: str, settings: TrainSettings, rng_seed: int) -> Run:
    """Train once and measure on the test data."""
    began = time.process_time()
    result = grow(task, settings=settings.replace(validate_every=10**9), rng_seed=rng_seed)
    seconds = time.process_time() - began
    assert result.test is not None
    return Run(result.steps, seconds, result.test.val_loss, result.test.val_accuracy)


def alone(settings: TrainSettings, steps: int) -> TrainSettings:
    """The host alone for ``steps`` steps, with the same schedule stretched over them."""
    return settings.replace(
        host_steps=steps - settings.incubate_steps - settings.blend_steps, finish_steps=0, max_germinations=0
    )


def paired(name: str, grown: list[float], other: list[float]) -> None:
    """One line: mean difference, its standard error, and how many pairs the grown network won."""
    gaps = [a - b for a, b in zip(grown, other, strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    wins = sum(gap > 0 for gap in gaps)
    print(f"{name}: {statistics.mean(gaps):+.3f} +- {error:.3f} (s.e.), ahead in {wins} of {len(gaps)}")


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="also write every run to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = get_task(arguments.task).defaults
    runs: dict[str, list[Run]] = {"grown": [], "same steps": [], "same time": []}
    train(
        arguments.task, settings.replace(host_steps=10, finish_steps=10, incubate_steps=5, blend_steps=5), 0
    )
    for rng_seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        grown = train(arguments.task, settings, rng_seed)
        same_steps = train(arguments.task, alone(settings, grown.steps), rng_seed)
        longer = round(grown.steps * grown.seconds / same_steps.seconds)
        same_time = train(arguments.task, alone(settings, longer), rng_seed)
        for name, run in zip(runs, (grown, same_steps, same_time), strict=True):
            runs[name].append(run)
            print(
                f"seed {rng_seed} {name:>10}: {run.steps:5d} steps {run.seconds:6.1f} s "
                f"loss {run.loss:.4f} accuracy {run.accuracy:.2f}%",
                flush=True,
            )
    for name in ("same steps", "same time"):
        ours, theirs = runs["grown"], runs[name]
        paired(f"accuracy, {name}", [r.accuracy for r in ours], [r.accuracy for r in theirs])
        paired(f"loss below, {name}", [-r.loss for r in ours], [-r.loss for r in theirs])
    if arguments.json:
        about = {"torch": torch.__version__, "machine": platform.machine(), "threads": arguments.threads}
        table = {name: [vars(run) for run in each] for name, each in runs.items()}
        with open(arguments.json, "w") as file:
            json.dump({"about": about, "runs": table}, file, indent=1)


if __name__ == "__main__":
    main()

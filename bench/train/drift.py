"""How often the drift test shoots a healthy run, and how soon it finds a climb, in simulated losses.

    python bench/train/drift.py --runs 1000

Judged by ``governor_step_`` with the settings of ``GovernorConfig.strict()``; only the reason DRIFT counts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tolaria import ops
from tolaria.governor import GovernorConfig, PanicReason

START = 300
"""Step at which a climb begins."""


def first_alarms(losses: Tensor) -> Tensor:
    """Step of each run's first DRIFT verdict, NaN without one; ``losses`` is ``(steps, runs)``."""
    state = ops.governor_state(losses.shape[1], attached=False)
    settings = GovernorConfig.strict(rule="all", log_only=True).to_tensor(None, "cpu")
    first = torch.full((losses.shape[1],), math.nan)
    for step, loss in enumerate(losses):
        ops.governor_step_(state, settings, loss)
        first[(state[ops.StateField.reason] == PanicReason.DRIFT) & first.isnan()] = step
    return first


def correlated(source: torch.Generator, like: Tensor, kept: float) -> Tensor:
    """Noise of unit deviation that forgets ``1 - kept`` of itself a step."""
    fresh = torch.randn(like.shape, generator=source, dtype=like.dtype)
    for step in range(1, len(fresh)):
        fresh[step] = kept * fresh[step - 1] + math.sqrt(1 - kept * kept) * fresh[step]
    return fresh


def restarts(time: Tensor, source: torch.Generator, runs: int, rise: int) -> Tensor:
    """Cosine annealing with restarts every 150 to 1000 steps, 1.2- to 20-fold, each climbing for ``rise``."""
    period = torch.randint(150, 1000, (runs,), generator=source)
    jump = torch.exp(torch.empty(runs).uniform_(math.log(1.2), math.log(20.0), generator=source))
    phase = (time + torch.randint(0, 150, (runs,), generator=source)) % period
    high = 1.0 + (jump - 1.0) * 0.5 * (1.0 + torch.cos(math.pi * phase / period))
    return 0.1 * torch.where(phase < rise, 1.0 + (high - 1.0) * (phase + 1) / rise, high)


def cases(runs: int, steps: int) -> Iterator[tuple[str, bool, Tensor]]:
    """Name, whether it is a climb, and losses ``(steps, runs)``."""
    source = torch.Generator().manual_seed(0)
    time = torch.arange(steps, dtype=torch.float64).unsqueeze(1)

    def noisy(levels: Tensor, scale: float) -> Tensor:
        return levels * torch.exp(scale * torch.randn(steps, runs, generator=source, dtype=torch.float64))

    flat, since = torch.full_like(time, 0.5), (time - START).clamp(min=0)
    for scale in (0.05, 0.3, 1.5):
        yield f"plateau, noise {scale}", False, noisy(flat, scale)
    yield (
        "plateau, noise 0.2 correlated over 20 steps",
        False,
        0.5 * torch.exp(0.2 * correlated(source, noisy(flat, 0.0), 0.95)),
    )
    for scale in (0.1, 0.3):
        constant = torch.exp(torch.empty(runs).uniform_(3.0, 7.6, generator=source))
        yield (
            f"exponential curve, noise {scale}",
            False,
            noisy(0.05 + 2.25 * torch.exp(-time / constant), scale),
        )
        power = torch.empty(runs).uniform_(0.2, 1.0, generator=source)
        yield f"power law, noise {scale}", False, noisy(2.3 * (1.0 + time / 20.0) ** -power, scale)
    for rise in (1, 10, 50):
        for scale in (0.02, 0.1, 0.3):
            levels = restarts(time, source, runs, rise)
            yield f"restart within {rise}, noise {scale}", False, noisy(levels, scale)
    for growth, scale in ((0.002, 0.1), (0.002, 0.3), (0.005, 0.02), (0.01, 0.1), (0.03, 0.3)):
        climb = noisy(0.3 * torch.exp(growth * since.clamp(max=600)), scale)
        yield f"climb of {growth} a step, noise {scale}", True, climb
    for slope in (0.01, 0.03, 0.1):
        source_noise = 0.05 * torch.randn(steps, runs, generator=source, dtype=torch.float64)
        yield f"climb of {slope} deviations a step", True, 0.5 + 0.05 * slope * since + source_noise


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    for name, is_climb, losses in cases(options.runs, options.steps):
        first = first_alarms(losses)
        told = (first >= START) if is_climb else ~first.isnan()
        delay = f"after {float((first[told] - START).nanmedian()):.0f}" if is_climb and told.any() else ""
        print(f"{name:48s} {int(told.sum()):6d} of {len(told)} {delay}", flush=True)


if __name__ == "__main__":
    main()

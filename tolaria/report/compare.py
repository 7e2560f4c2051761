"""Runs beside each other: what differs, what became of each, and the same seeds in pairs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from tolaria.report.incidents import score_of
from tolaria.report.lines import Line, number
from tolaria.report.overview import flat
from tolaria.report.reading import RunReading
from tolaria.report.words import count, figure, percent, plain

_BESIDE = ("rng_seed", "total_steps", "data_dir", "threads")
_MOST_DIFFERENCES = 60


def compare(runs: Sequence[RunReading], names: Sequence[str]) -> Line:
    """Tables: a row for each run, the settings in which they differ, pairs of the same seed."""
    return {
        "head": ["Run", "Seed", "Steps", "Rollbacks", "Training lost", "Score", "Ended"],
        "rows": [_row(run, name) for run, name in zip(runs, names, strict=True)],
        "differences": _differences(runs, names),
        "pairs": _pairs(runs, names),
    }


def end_score(run: RunReading) -> tuple[str, float] | None:
    """How good the network was at the end: the test accuracy, else the last validation."""
    test = run.summary.get("test")
    value = number(test.get("val_accuracy")) if isinstance(test, dict) else None
    if value is not None and math.isfinite(value):
        return "test accuracy (%)", value
    score = score_of(run)
    known = [f[score.name] for _, f in run.validations if score is not None and score.name in f]
    if score is None or not known or not math.isfinite(known[-1]):
        return None
    return f"last {score.name}" + (" (%)" if score.is_accuracy else ""), known[-1]


def _row(run: RunReading, name: str) -> list[str]:
    steps = max(run.last_step, run.log.last_step)
    score = end_score(run)
    ended = "no end recorded"
    if run.summary:
        ended = "as planned"
        if run.summary.get("interrupted"):
            ended = "interrupted"
        if run.summary.get("diverged") is not None:
            ended = "diverged"
    watched = run.config.get("governor") is not None or run.log.attach is not None
    return [
        name, plain(run.config.get("rng_seed", "")), f"{steps:,}",
        f"{run.log.rollbacks:,}" if watched else "nobody watched",
        percent(run.log.steps_lost / max(1, steps)),
        "" if score is None else f"{figure(score[1], 4)}, {plain(score[0])}", ended,
    ]  # fmt: skip


def _differences(runs: Sequence[RunReading], names: Sequence[str]) -> Line:
    """Settings that are not the same in all runs."""
    configs = [dict(flat(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    rows = []
    for key in keys:
        values = [config.get(key, "none") for config in configs]
        if any(value != values[0] for value in values):
            rows.append([plain(key), *(plain(value) for value in values)])
    return {"head": ["Setting", *names], "rows": rows[:_MOST_DIFFERENCES], "count": len(rows)}


def _variant(run: RunReading) -> tuple[tuple[str, str], ...]:
    """What a run is beside its seed."""
    return tuple(
        sorted(
            (key, str(value))
            for key, value in flat(run.config)
            if key not in _BESIDE and not key.startswith("versions.")
        )
    )


def _pairs(runs: Sequence[RunReading], names: Sequence[str]) -> list[str]:
    """Sentences: each other kind of run against the first, seed by seed."""
    kinds: dict[tuple[tuple[str, str], ...], dict[str, int]] = {}
    for at, run in enumerate(runs):
        if run.config and "rng_seed" in run.config:
            kinds.setdefault(_variant(run), {}).setdefault(str(run.config["rng_seed"]), at)
    if len(kinds) < 2:
        return (
            ["All runs have the same settings but for their seeds: there is nothing to pair."]
            if kinds
            else []
        )
    (first, base), *others = kinds.items()
    return [_pair(runs, names, dict(first), base, dict(kind), seeds) for kind, seeds in others]


def _pair(
    runs: Sequence[RunReading], names: Sequence[str], was: dict[str, str], base: dict[str, int],
    now: dict[str, str], seeds: dict[str, int],
) -> str:  # fmt: skip
    changed = [key for key in dict.fromkeys((*was, *now)) if was.get(key) != now.get(key)]
    groups = [key.partition(".")[0] for key in changed]  # many settings of one part are called by the part
    changed = list(
        dict.fromkeys(g if groups.count(g) > 3 else k for g, k in zip(groups, changed, strict=True))
    )
    label = f"{names[next(iter(seeds.values()))]} against {names[next(iter(base.values()))]}"
    what = (
        f"{label} (they differ in {', '.join(map(plain, changed[:4]))}{' ...' if len(changed) > 4 else ''})"
    )
    scores = {
        seed: (end_score(runs[base[seed]]), end_score(runs[at])) for seed, at in seeds.items() if seed in base
    }
    both = [(a, b) for a, b in scores.values() if a is not None and b is not None and a[0] == b[0]]
    if not both:
        return f"{what}: no seed in common with a score of the same kind."
    steps = [b[1] - a[1] for a, b in both]
    mean = statistics.fmean(steps)
    said = f"{what}: {plain(both[0][0][0])} {mean:+.3g} over {count(len(steps), 'seed')} in pairs"
    if len(steps) > 1:
        error = statistics.stdev(steps) / math.sqrt(len(steps))
        ahead = sum(step > 0 for step in steps)
        return f"{said}, standard error {error:.2g}; ahead in {ahead}, behind in {sum(s < 0 for s in steps)}."
    return f"{said}; one pair says nothing about chance."

"""Who catches runs that break, and leaves alone those that do not: real runs, hurt in many ways.

    python bench/train/arena.py --seeds 0 1 --workers 2
    python bench/train/arena.py --seeds 1 --share 0.01 --only "GovernorConfig.balanced()"

The first takes hours. Even seeds are for tuning a rule, odd ones are held out of it. What becomes of a
run without a governor is its truth. A row tells for one contestant: broken runs that it caught, runs
rolled back that would have recovered by themselves, false alarms in 10,000 healthy steps, steps until it
caught, points lost at the end of caught runs. Packages that are not installed are left out by name.
``--truth`` finds the truth alone, and writes it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import warnings
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arena import truths
from arena.contestants import CONTESTANTS, PACKAGES
from arena.runs import Fate, Run, runs
from arena.runs import truths as find_truths
from arena.scores import Result, row, table, watched_training


def compete(work: tuple[list[Run], tuple[str, ...]]) -> list[Result]:
    """All contestants in runs of one training."""
    chosen, names = work
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fates = find_truths(chosen)
        return [result for name in names for result in watched_training(name, chosen, fates)]


def find_truth(chosen: list[Run]) -> list[tuple[Run, Fate]]:
    """What becomes of runs of one training."""
    torch.set_num_threads(1)
    return [(run, found.fate) for run, found in zip(chosen, find_truths(chosen), strict=True)]


def available(only: list[str] | None) -> tuple[str, ...]:
    """The contestants that can take part; tells of the others."""
    names = []
    for name in CONTESTANTS if only is None else only:
        package = PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            print(f"left out: {name}, since {package} is not installed")
        else:
            names.append(name)
    return tuple(names)


def main() -> None:
    """Run, print the table, and write it with every result if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--share", type=float, default=1.0, help="of all runs, spread evenly")
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), metavar="CONTESTANT")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--truth", action="store_true", help=f"write {truths.FILE.name}, no more")
    parser.add_argument("--out", type=Path, help="a folder for arena.md and arena.json")
    options = parser.parse_args()
    names = available(options.only)
    chosen = [
        run
        for harmed in (True, False)
        for run in runs(tuple(options.seeds), harmed=harmed, share=options.share)
    ]
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in chosen:
        groups.setdefault((run.problem.name, run.batch, run.rate, run.seed), []).append(run)
    results: list[Result] = []
    with get_context("spawn").Pool(options.workers) as pool:
        if options.truth:
            found = pool.imap_unordered(find_truth, groups.values())
            truths.write([pair for pairs in found for pair in pairs])
            return
        for found in pool.imap_unordered(compete, [(group, names) for group in groups.values()]):
            results += found
            done = len(results) // max(1, len(names))
            print(f"\r{done} of {len(chosen)} runs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    fates = {fate: sum(r.truth.fate is fate for r in results) // max(1, len(names)) for fate in Fate}
    text = table([row(name, results) for name in names], fates)
    differ = truths.differing({(r.run, r.truth.fate): None for r in results})
    if differ:
        text += f"\n\n{len(differ)} fates are others than the committed ones: {'; '.join(differ)}."
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "arena.md").write_text(text + "\n")
        (options.out / "arena.json").write_text(json.dumps([r.plain() for r in results], indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Rolls back under every optimizer of the packages that are installed, and compares with ``load_state_dict``.

    PYTHONPATH=. python tests/optimizer_packages.py [--package NAME ...] [--only NAME ...] [--list]

Each optimizer trains a small network with vectors, matrices and convolutions, some of them large enough to be
quantised. It is captured before its first step (fresh) and after a few (warm), by ``TolariaGovernor`` and by
``tolaria.Snapshot``. Then it trains on, every tensor of model and optimizer is overwritten with NaN, it is
rolled back and trains on again. All bits of it must be those of a run that went back by deep copies of
``state_dict()`` and ``load_state_dict``; where these lose something, those of an uninterrupted run.

One line for each optimizer and a count at the end; exit status 1 if one differs, crashes or finds no end.
Packages that are not installed are named and left out, as are optimizers that cannot run here without
tolaria.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import io
import itertools
import multiprocessing
import sys
import warnings
from collections import Counter
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from tests.optimizer_runs import Found, Run, Way, find_way
from tolaria import GovernorConfig, Snapshot, SnapshotError, TolariaGovernor

PACKAGES = {
    "bitsandbytes": "bitsandbytes.optim",
    "torchao": "torchao.optim",
    "schedulefree": "schedulefree",
    "timm": "timm.optim",
    "pytorch_optimizer": "pytorch_optimizer",
    "torch_optimizer": "torch_optimizer",
    "optimi": "optimi",
    "prodigyopt": "prodigyopt",
    "lion_pytorch": "lion_pytorch",
    "came_pytorch": "came_pytorch",
    "dadaptation": "dadaptation",
    "adam_mini": "adam_mini",
    "torch": "torch.optim",
}
"""The name of a package, and the module that exports its optimizers."""

WARM, DETOUR, REST = 5, 4, 6
"""Steps before a warm capture, between the capture and the wreck, and after the rollback."""


def by_plain(cls: Any, way: Way, warm: int) -> Found:
    """The end of a run that goes back by ``load_state_dict``."""
    run = Run(cls, way)
    run.train(warm, first=0)
    saved = copy.deepcopy(run.model.state_dict()), _copied(run.optimizer.state_dict())
    run.train(DETOUR, first=100)
    run.wreck()
    run.model.load_state_dict(saved[0])
    run.optimizer.load_state_dict(saved[1])
    run.train(REST, first=200)
    return run.state()


def _copied(state: Any) -> Any:
    """A deep copy; of state that cannot be cloned (torchao's), one that was saved and loaded."""
    try:
        return copy.deepcopy(state)
    except NotImplementedError:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=False)


def uninterrupted(cls: Any, way: Way, warm: int) -> Found:
    """The end of a run that never went back."""
    run = Run(cls, way)
    run.train(warm, first=0)
    run.train(REST, first=200)
    return run.state()


def rolled_back(cls: Any, way: Way, warm: int, tool: str) -> Found:
    """The end of a run that goes back by tolaria."""
    run = Run(cls, way)
    run.train(warm, first=0)
    # What is no whole optimizer goes beside the one within.
    extras = {} if run.covered is run.optimizer else {"wrapper": run.optimizer}
    if tool == "governor":
        config = GovernorConfig(snapshot_interval=1000)
        back = TolariaGovernor(run.model, run.covered, extras=extras, config=config).execute_rollback
    else:
        snapshot = Snapshot(run.model, run.covered, extras=extras)
        snapshot.capture()
        back = snapshot.restore  # type: ignore[assignment]
    run.train(DETOUR, first=100)
    run.wreck()
    back()
    run.train(REST, first=200)
    return run.state()


def difference(a: Found, b: Found) -> str:
    """The first path at which two states differ; empty: none."""
    for path in sorted(a.keys() | b.keys()):
        if path not in a or path not in b:
            return f"{path} is in one alone"
        if a[path] != b[path]:
            return path
    return ""


def judge(cls: Any, way: Way) -> tuple[str, str]:
    """A verdict, and what there is to say of it."""
    notes: list[str] = []
    for warm, tool in itertools.product((0, WARM), ("governor", "snapshot")):
        case = f"{'warm' if warm else 'fresh'}, {tool}"
        through = uninterrupted(cls, way, warm)
        try:
            plain = by_plain(cls, way, warm)
            lost = difference(plain, through)
        except Exception as error:
            plain, lost = through, _said(error)
        try:
            ours = rolled_back(cls, way, warm, tool)
        except SnapshotError as error:
            return "refused", f"{case}: {error}"
        except Exception as error:
            return "crashed", f"{case}: {_said(error)}"
        wrong = difference(ours, plain)
        if wrong and difference(ours, through):
            return "differs", f"{case}: {wrong}; from an uninterrupted run: {difference(ours, through)}"
        if wrong or (lost and plain is through):
            notes.append(f"{case}: as uninterrupted; load_state_dict alone: {lost or wrong}")
    return "exact", "; ".join(notes)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def work(cls: Any, channel: Connection) -> None:
    """Judge one optimizer and send the verdict."""
    torch.set_num_threads(1)
    sys.stdout = io.StringIO()  # some print whenever they switch their mode
    warnings.simplefilter("ignore")
    try:
        way = find_way(cls)
    except Exception as error:
        channel.send(("cannot run", _said(error)))
        return
    channel.send(judge(cls, way))


def in_a_child(cls: Any, seconds: float) -> tuple[str, str]:
    """Judge one optimizer in a forked process, which it may take down with it."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=work, args=(cls, there))
    child.start()
    there.close()
    try:
        return here.recv() if here.poll(seconds) else ("no end", f"after {seconds:.0f} s")
    except EOFError:
        child.join()
        return "crashed", f"the process ended with {child.exitcode}"
    finally:
        child.kill()
        child.join()


def _made_by_name(timm: Any, name: str, *args: object, **settings: object) -> Any:
    return timm.get_optimizer_class(name)(*args, **settings)


def exported(module: str) -> dict[str, Any]:
    """The optimizer classes that a module exports, and wrappers that are none but behave as one; by name."""
    found = importlib.import_module(module)
    by_name: dict[str, Any] = {}
    if hasattr(found, "get_supported_optimizers"):  # pytorch_optimizer: more than it exports
        more = map(found.load_optimizer, found.get_supported_optimizers())
        by_name = {cls.__name__: cls for cls in more}
    elif hasattr(found, "list_optimizers"):  # timm: with settings bound to its classes and torch's
        return {name: partial(_made_by_name, found, name) for name in found.list_optimizers()}
    return {
        name: thing
        for name, thing in sorted((vars(found) | by_name).items())
        if inspect.isclass(thing) and thing is not torch.optim.Optimizer and not inspect.isabstract(thing)
        if all(callable(getattr(thing, method, None)) for method in ("step", "load_state_dict", "zero_grad"))
    }


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--package", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="optimizers by class name")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    parser.add_argument("--seconds", type=float, default=300, help="most for one optimizer")
    options = parser.parse_args()
    counts: dict[str, Counter[str]] = {}
    warnings.simplefilter("ignore")
    for package in options.package:
        try:
            classes = exported(PACKAGES[package])
        except ImportError as error:
            print(f"{package}: left out ({error})")
            continue
        counts[package] = Counter()
        for name, cls in classes.items():
            if options.only and name not in options.only:
                continue
            verdict, note = ("listed", "") if options.list else in_a_child(cls, options.seconds)
            counts[package][verdict] += 1
            print(f"{package:18} {name:28} {verdict:10} {note}", flush=True)
    for package, found in counts.items():
        print(f"{package}: " + ", ".join(f"{n} {verdict}" for verdict, n in sorted(found.items())))
    whole = sum(counts.values(), Counter())
    print("in all: " + ", ".join(f"{n} {verdict}" for verdict, n in sorted(whole.items())))
    return bool(whole["differs"] + whole["crashed"] + whole["no end"])


if __name__ == "__main__":
    sys.exit(main())

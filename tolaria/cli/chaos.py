"""``tolaria chaos``: break the training of a task in every way; a thin shell around :mod:`tolaria.chaos`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from tolaria.chaos import (
    ChaosTable,
    Outcome,
    chosen_faults,
    list_chaos_faults,
    random_faults,
    run_table,
    task_run,
)
from tolaria.chaos.table import header_line, outcome_line
from tolaria.cli.arguments import add_preset
from tolaria.cli.task_name import add_task, settle_task
from tolaria.errors import MissingDependencyError
from tolaria.nn.device import validate_device
from tolaria.runs import cpu_threads
from tolaria.tasks import get_task
from tolaria.train import governor_config_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tolaria chaos``."""
    parser.usage = "%(prog)s [TASK] [options]"
    add_task(parser, "digits")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--faults", metavar="A,B", help=f"some of {', '.join(list_chaos_faults())} (default: all)"
    )
    chosen.add_argument(
        "--random", type=int, metavar="N", help="N times NaN or infinity in a random place instead"
    )
    parser.add_argument(
        "--steps", type=int, default=300, metavar="N", help="optimizer steps of every run (default: 300)"
    )
    parser.add_argument(
        "--start", type=int, metavar="N", help="first step of every fault (default: drawn for each)"
    )
    parser.add_argument(
        "--snapshot-interval", type=int, default=50, metavar="N", help="steps between captures (50)"
    )
    add_preset(parser)
    parser.add_argument("--data-dir", metavar="DIR", help="where a task that needs files finds them")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument(
        "--rng-seed", type=_rng_seed, default=0, metavar="N", help="weights, data order, places (default: 0)"
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON, nothing else")
    parser.add_argument("--out", metavar="FILE", help="write the table as JSON to this file, too")


def run(arguments: argparse.Namespace) -> int:
    """Print the table; 0 if every fault ended as promised, 1 if not, 2 for a bad option."""
    printer = _Printer(silent=arguments.json)
    log = logging.getLogger("tolaria.governor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # one fault is a sink that raises
    try:
        table = _table(arguments, printer)
    except MissingDependencyError:
        raise
    except (ValueError, RuntimeError, OSError) as error:
        if printer.seen > 1:  # faults were being tried: this is no matter of the command line
            raise
        print(f"tolaria chaos: {error}", file=sys.stderr)
        return 2
    finally:
        log.setLevel(level)
    text = json.dumps(table.as_dict(), indent=2)
    if arguments.out is not None:
        Path(arguments.out).write_text(text + "\n", encoding="utf-8")
    print(text if arguments.json else f"\n{table.summary()}")
    return 0 if table.is_as_promised else 1


def _table(arguments: argparse.Namespace, printer: _Printer) -> ChaosTable:
    settle_task(arguments)
    device, spec = validate_device(arguments.device), get_task(arguments.task or "digits")
    config = governor_config_for(
        spec, preset=arguments.preset or "default", snapshot_interval=arguments.snapshot_interval
    )
    if arguments.random is not None and arguments.random < 1:
        raise ValueError(f"random: expected an integer >= 1, got {arguments.random}")
    if arguments.random is not None:
        faults = random_faults(arguments.random, rng_seed=arguments.rng_seed)
    else:
        names = None if arguments.faults is None else [n.strip() for n in arguments.faults.split(",")]
        faults = chosen_faults(names)
    files = None if arguments.data_dir is None else Path(arguments.data_dir)
    with cpu_threads(arguments.threads):
        if arguments.out is not None:
            _try_file(Path(arguments.out))
        return run_table(
            lambda: task_run(spec, device=device, rng_seed=arguments.rng_seed, config=config, data_dir=files),
            faults=faults, steps=arguments.steps, start=arguments.start, rng_seed=arguments.rng_seed,
            on_outcome=printer,
        )  # fmt: skip


class _Printer:
    """Prints rows as they come."""

    def __init__(self, *, silent: bool) -> None:
        self.silent, self.undisturbed, self.seen = silent, 0.0, 0

    def __call__(self, outcome: Outcome) -> None:
        """A row; the undisturbed run's score is the last column of the others."""
        self.seen += 1
        if self.silent:
            return
        if outcome.fault == "nothing":
            self.undisturbed = outcome.score
            print(header_line(), flush=True)
            return
        print(outcome_line(outcome, self.undisturbed), flush=True)


def _try_file(path: Path) -> None:
    """Fail now, not after all the work; leave nothing behind."""
    is_new = not path.exists()
    try:
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise ValueError(f"out: expected a file that can be written, got {path}: {error}") from error
    if is_new:
        path.unlink()


def _rng_seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to {2**31 - 1}, got {text!r}")
    return value

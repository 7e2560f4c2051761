"""Which task the command line names: one that is registered, or ``module:attribute`` of the user's own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tolaria.tasks import list_tasks


def add_task(parser: argparse.ArgumentParser, default: str, *, more: str = "") -> None:
    """Add TASK, and ``--task`` for the same."""
    known = f"one of {', '.join(list_tasks())}{more}, or module:attribute, a TaskSpec of your own"
    parser.add_argument("task", nargs="?", help=f"{known} (default: {default})")
    parser.add_argument("--task", dest="named_task", metavar="TASK", help="the same, by an option")


def settle_task(arguments: argparse.Namespace) -> None:
    """Make both ways one, ``arguments.task``; modules of the current folder can be imported from here on.

    Raises:
        ValueError: both are given.
    """
    if arguments.named_task is not None:
        if arguments.task is not None:
            raise ValueError(f"--task: expected not to come with TASK ({arguments.task})")
        arguments.task = arguments.named_task
    del arguments.named_task
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)

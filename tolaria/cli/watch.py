"""``tolaria watch``: the page of a run that is still going; a thin shell around :mod:`tolaria.report`."""

from __future__ import annotations

import argparse
import sys

from tolaria.report import watch_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tolaria watch``."""
    parser.description = (
        "Serve the page of `tolaria report` about a run that is still going, on this machine alone, until "
        "Ctrl-C. New points appear within two seconds. Nothing is written to the run's folder."
    )
    parser.add_argument(
        "run_folder", metavar="RUN", help="a run folder, or a .jsonl file that a JsonLinesSink wrote"
    )
    parser.add_argument("--host", default="127.0.0.1", help="a loopback address (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="default: any that is free")


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C; 2 for a bad option."""
    try:
        watch_run(
            arguments.run_folder,
            host=arguments.host,
            port=arguments.port,
            say=lambda text: print(text, flush=True),
        )
    except ValueError as error:
        print(f"tolaria watch: {error}", file=sys.stderr)
        return 2
    return 0

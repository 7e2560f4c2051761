"""``tolaria report``: runs as one page that people look at; a thin shell around :mod:`tolaria.report`."""

from __future__ import annotations

import argparse
import sys

from tolaria.report import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tolaria report``."""
    parser.description = (
        "Write one HTML page about a run, or about several beside each other. It holds its data, its script "
        "and the chart library: it needs no network and no server. Exit status: 0, 2 for a bad option."
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run folder, or a .jsonl file that a JsonLinesSink wrote"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the page (default: report.html in the run's folder, for several runs in the current one)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page and say where it is; 2 for a bad option."""
    try:
        page = write_report(arguments.runs, arguments.out)
    except ValueError as error:
        print(f"tolaria report: {error}", file=sys.stderr)
        return 2
    print(page)
    return 0

"""``report.html``: runs read once, written as one page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tolaria.report.page import MARK, data_of, render
from tolaria.report.reading import RunReading
from tolaria.runs.files import write_whole

_FINE, _COARSE, _MOST_RUNS = 4096, 1024, 64


def write_report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write one page about ``runs``, beside each other if there are several.

    Args:
        runs: run folders, folders with ``events*.jsonl`` or ``metrics*.jsonl``, or files that a
            ``JsonLinesSink`` wrote; 1 to 64.
        out: the page; ``report.html`` in the folder of a single run, else in the current folder, if None.

    Returns:
        Where the page is.

    Raises:
        ValueError: a run is none, there are too many, or ``out`` is a file that is no such page.
        OSError: a file cannot be read or written.
        MissingDependencyError: plotly is not installed.
    """
    if not 1 <= len(runs) <= _MOST_RUNS:
        raise ValueError(f"runs: expected 1 to {_MOST_RUNS} runs, got {len(runs)}")
    buckets = _FINE if len(runs) <= 4 else _COARSE
    readings = [RunReading(Path(run), buckets=buckets) for run in runs]
    target = Path(out) if out is not None else _default(readings)
    check_target(target)
    for reading in readings:
        reading.refresh()
    write_whole(target, render(data_of(readings, target.parent)))
    return target


def _default(readings: Sequence[RunReading]) -> Path:
    return (readings[0].folder if len(readings) == 1 else Path()) / "report.html"


def check_target(target: Path) -> None:
    """Whether a page may be written there.

    Raises:
        ValueError: it is a folder, or a file that is no page of ours, or its folder is not there.
    """
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"out: expected a file in a folder that is there, got {target}")
    if target.exists():
        with target.open("rb") as file:
            if MARK not in file.read(4096):
                raise ValueError(f"out: expected a new file or an earlier report, {target} is another file")

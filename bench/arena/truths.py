"""The truth that is committed: what became of every run when nobody stepped in.

The rule had been made on losses recorded from some runs of seed 0 before this was written; what is changed
since is tuned on even seeds. Runs near the border between recovering and broken may fall to the other side on
another processor, so the arena finds the truth anew and tells how many differ from this file.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from arena.runs import HARMS, Fate, Run

FILE = Path(__file__).with_name("truth.txt")
_LETTERS = {Fate.HEALTHY: "h", Fate.RECOVERS: "r", Fate.BROKEN: "B"}
_CALLS = (None, *HARMS)
_FATES = {letter: fate for fate, letter in _LETTERS.items()}
_UNKNOWN = "."


def _training(run: Run) -> str:
    return f"{run.problem.name}; {run.batch}; {run.rate:g}; {run.seed}"


def committed(file: Path = FILE) -> dict[str, Fate]:
    """The fate of each run, by the run's own words."""
    found: dict[str, Fate] = {}
    for line in file.read_text().splitlines():
        if line.startswith("#") or not line.strip():
            continue
        fates, name, batch, rate, seed = (part.strip() for part in line.split(";"))
        for harm, letter in zip(_CALLS, fates, strict=True):
            if letter != _UNKNOWN:
                found[f"{name}, {batch} at {rate}, seed {seed}: {harm or 'nothing'}"] = _FATES[letter]
    return found


def write(fates: Iterable[tuple[Run, Fate]], file: Path = FILE) -> None:
    """One line for each training, one letter for each run of it."""
    table: dict[str, dict[str | None, str]] = {}
    for run, fate in fates:
        table.setdefault(_training(run), {})[run.harm] = _LETTERS[fate]
    lines = ["# h: healthy, r: recovers, B: stays broken. Columns, in their order:"]
    lines += [f"# {number}: {harm or 'nothing'}" for number, harm in enumerate(_CALLS, 1)]
    for training, letters in sorted(table.items()):
        lines.append("".join(letters.get(harm, _UNKNOWN) for harm in _CALLS) + f"; {training}")
    file.write_text("\n".join(lines) + "\n")


def differing(fates: Iterable[tuple[Run, Fate]], file: Path = FILE) -> list[str]:
    """The runs whose fate here is another than the committed one."""
    known = committed(file)
    return [str(run) for run, fate in fates if known.get(str(run), fate) is not fate]

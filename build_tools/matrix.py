"""Install and test against several torches, each in a fresh environment; write the table in docs/building.md.

    python build_tools/matrix.py [--smoke] [--write] [--python PYTHON] [floor | newest | VERSION]...

Without versions: the floor of pyproject.toml and the newest. Each is fetched (gigabytes where PyPI has it
with CUDA), tolaria built against it for the CPU with README's command, and the suite run, or with ``--smoke``
the ops alone. ``--write`` puts the rows into the marked block of docs/building.md; a row of the same torch,
Python and suite is replaced, others stay. An environment is deleted before the next one is made. The exit
status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "building.md"
BEGIN, END = "<!-- build_tools/matrix.py writes these rows -->", "<!-- to here -->"
HEAD = "| torch | Python | suite | on | result |\n|---|---|---|---|---|"
SMOKE = ["tests/ops", "-m", "not slow and not cuda"]
NOT_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "TOLARIA_BACKEND", "TOLARIA_BUILD")


@dataclass(frozen=True, slots=True)
class Row:
    """What one torch came to."""

    torch: str
    python: str
    suite: str
    date: str
    result: str
    """pytest's last line, or the step that failed."""
    passed: bool

    def __str__(self) -> str:
        """A line of the table."""
        cells = (self.torch, self.python, self.suite, self.date, self.result)
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def requirement(version: str, pyproject: str) -> str:
    """What pip is asked for: the floor's newest patch release, the newest of all, or a version.

    Raises:
        ValueError: pyproject.toml has no floor, or the version is none.
    """
    if version == "newest":
        return "torch"
    if version == "floor":
        found = re.search(r'"torch>=(\d+)\.(\d+)', pyproject)
        if found is None:
            raise ValueError('pyproject.toml: expected a dependency "torch>=X.Y", got none')
        return f"torch=={found[1]}.{found[2]}.*"
    if not re.fullmatch(r"\d+(\.\d+)+(\+\w+)?", version):
        raise ValueError(f"version: expected floor, newest or one such as 2.11.0, got {version!r}")
    return f"torch=={version}"


def last_words(output: str) -> str:
    """The last line that says something, without pytest's frame and time."""
    lines = [line.strip("= \t") for line in output.splitlines() if line.strip("= \t")]
    return re.sub(r" in [\d.]+s.*$", "", lines[-1]) if lines else "no output"


def environment() -> dict[str, str]:
    """For what runs in the new environment: none of ours, no CUDA kernels, the same examples every time."""
    ours = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
    return {**ours, "TOLARIA_CUDA": "0", "CI": os.environ.get("CI", "true"), "PIP_NO_INPUT": "1"}


def run(command: list[str | Path]) -> tuple[int, str]:
    """Run a command in the root, show its output as it comes; its status and all it said."""
    print("+", *command, flush=True)
    said: list[str] = []
    with subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            print(line, end="", flush=True)
    return process.returncode, "".join(said)


def try_torch(wanted: str, python: str, *, smoke: bool) -> Row:
    """Make an environment with that torch, install tolaria, test it, delete the environment."""
    date, suite = datetime.date.today().isoformat(), "ops" if smoke else "whole"
    with tempfile.TemporaryDirectory(prefix="tolaria-matrix-") as folder:
        programs = Path(folder) / "bin"
        versions = "import platform, torch; print(torch.__version__, platform.python_version())"
        steps: dict[str, list[str | Path]] = {
            "venv": [python, "-m", "venv", folder],
            "pip install torch": [programs / "pip", "install", "-q", wanted],
            "pip install tolaria": [programs / "pip", "install", "-q", ".[test]"],
            "tolaria doctor": [programs / "tolaria", "doctor"],
            "import torch": [programs / "python", "-c", versions],
        }
        said = ""
        for name, command in steps.items():
            status, said = run(command)
            if status:
                return Row(wanted, "?", suite, date, f"{name} FAILED: {last_words(said)[:80]}", False)
        torch, version = last_words(said).split()[-2:]
        status, said = run([programs / "pytest", "-q", "-p", "no:cacheprovider", *(SMOKE if smoke else [])])
        verdict = last_words(said) if status == 0 else f"FAILED: {last_words(said)}"
        return Row(torch, version, suite, date, verdict, status == 0)


def with_rows(page: str, rows: list[Row]) -> str:
    """The page with these rows in its marked block, newest torch first.

    Raises:
        ValueError: the page has no such block.
    """
    if page.count(BEGIN) != 1 or END not in page.partition(BEGIN)[2]:
        raise ValueError(f"{PAGE.name}: expected one block from {BEGIN!r} to {END!r}, got none")
    before, _, rest = page.partition(BEGIN)
    block, _, after = rest.partition(END)
    lines = [line for line in block.splitlines() if line.startswith("| ")][1:]
    kept = {tuple(line.split(" | ")[:3]): line for line in lines}
    kept.update({tuple(str(row).split(" | ")[:3]): str(row) for row in rows})

    def numbers(line: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", line.split(" | ")[0])[:3]]

    table = "\n".join([HEAD, *sorted(kept.values(), key=numbers, reverse=True)])
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="*", default=["floor", "newest"], help="default: floor newest")
    parser.add_argument("--smoke", action="store_true", help="the tests of the ops alone")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/building.md")
    parser.add_argument("--python", default=sys.executable, help="the Python of the environments")
    arguments = parser.parse_args()
    try:
        pyproject = (ROOT / "pyproject.toml").read_text()
        wanted = [requirement(version, pyproject) for version in arguments.versions]
    except ValueError as error:
        parser.error(str(error))
    rows: list[Row] = []
    for one in wanted:
        start = time.monotonic()
        rows.append(try_torch(one, arguments.python, smoke=arguments.smoke))
        print(f"{rows[-1]} [{time.monotonic() - start:.0f} s]", flush=True)
        if arguments.write:
            PAGE.write_text(with_rows(PAGE.read_text(), rows))
    print("; ".join(f"torch {row.torch}, Python {row.python}: {row.result}" for row in rows))
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Run every documented command, from the root of a fresh clone, against the installed package.

    python tests/docs/run_commands.py [--quick] [--full] [--list] [PART...]

Each page has a clone of its own (of the last commit), and its commands run there in the order in which they
stand. tolaria must be installed in the environment of the Python that runs this. Commands that install are
left out unless ``--full`` is given: then each page that has any gets a new environment, too. What is left
out, and why, is said. A command that is not in ``commands.KNOWN`` is a failure.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path

from commands import KNOWN, ROOT, Found, Known, find

_OURS = (
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "TOLARIA_BACKEND",
    "TOLARIA_BUILD",
    "TOLARIA_REQUIRE_CUDA",
)


def main() -> int:
    """Command line; 0 if every command that could run here did, 1 if one failed or is not known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="only commands that hold one of these, or pages"
    )
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes")
    parser.add_argument("--full", action="store_true", help="install, too, in new environments (network)")
    parser.add_argument("--list", action="store_true", help="tell what would be done, and do nothing")
    options = parser.parse_args()
    wanted = [
        f for f in find() if not options.parts or any(p in f.text or p in f.page for p in options.parts)
    ]
    if not options.list and not options.full:
        refuse_without_installed()
    runner = Runner(options)
    for page, found in groupby(wanted, key=lambda each: each.page):
        runner.page(page, sorted(found, key=lambda each: each.line))
    print(f"\n{runner.ran} ran, {runner.failed} failed, {runner.left} left out")
    return 1 if runner.failed else 0


def refuse_without_installed() -> None:
    """Commands are to meet the package that a user has, not the tree."""
    code = "import tolaria; print(tolaria.__file__)"
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=elsewhere, env=environment(), capture_output=True, text=True
        )
    if done.returncode or Path(done.stdout.strip()).is_relative_to(ROOT):
        got = done.stdout.strip() or done.stderr.strip().splitlines()[-1]
        sys.exit(
            f"run_commands: expected tolaria installed for {sys.executable}, got {got}; run "
            'pip install ".[test]" there'
        )


def environment(folder: Path | None = None) -> dict[str, str]:
    """As in a new shell in which the environment is active."""
    kept = {name: value for name, value in os.environ.items() if name not in _OURS}
    binaries = Path(sys.executable).parent if folder is None else folder / "bin"
    return {**kept, "PATH": f"{binaries}{os.pathsep}{kept['PATH']}", "MPLBACKEND": "agg"}


class Runner:
    """Runs pages and counts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.ran = self.failed = self.left = 0
        self.done: set[str] = set()

    def page(self, page: str, found: list[Found]) -> None:
        """Every command of a page, in a clone of its own."""
        print(f"\n{page}", flush=True)
        with tempfile.TemporaryDirectory(prefix="tolaria-docs-") as folder:
            clone, venv = Path(folder) / "tolaria", None
            if not self.options.list:
                quietly("git", "clone", "--quiet", str(ROOT), str(clone))
            if self.options.full and any(KNOWN.get(f.text, Known()).installs for f in found):
                venv = Path(folder) / "venv"
                quietly(sys.executable, "-m", "venv", str(venv))
            for each in found:
                self.command(each, clone, venv)

    def command(self, found: Found, clone: Path, venv: Path | None) -> None:
        """Run one, or say why not."""
        known = KNOWN.get(found.text)
        if known is None:
            self.failed += 1
            print(f"  FAILED   {found.text}: line {found.line}: not in commands.KNOWN, say there what to do")
            return
        text = found.text if known.run is None or (known.installs and venv is not None) else known.run
        why = self.why_not(known, text)
        if why or self.options.list:
            self.left += 1
            print(
                f"  {'left out' if why else 'would run'} {found.text}{': ' + why if why else ''}", flush=True
            )
            return
        log = clone.parent / "log"
        start = time.monotonic()
        with log.open("w") as out:
            where = environment(venv)
            if (clone / ".venv").exists():
                where = environment(clone / ".venv")
            status = subprocess.run(
                ["bash", "-o", "pipefail", "-ec", text], cwd=clone, env=where, stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT,
            ).returncode  # fmt: skip
        self.ran += 1
        self.done.add(text)
        print(f"  {'FAILED' if status else 'ran':<8} {text}  [{time.monotonic() - start:.0f} s]", flush=True)
        if status:
            self.failed += 1
            last = log.read_text(errors="replace").splitlines()[-40:]
            print(f"           line {found.line}, status {status}:", *last, sep="\n    ", flush=True)

    def why_not(self, known: Known, text: str) -> str:
        """The reason to leave a command out; empty: run it."""
        if known.skip:
            return known.skip
        if known.installs and known.run is None and not self.options.full:
            return "it installs, what --full does in a new environment"
        missing = [name for name in known.needs if not is_here(name)]
        if missing:
            return f"needs {', '.join(missing)}"
        if known.long and self.options.quick:
            return "takes minutes (--quick)"
        if text in self.done and not text.startswith(("pip", "python setup.py", "python bench")):
            return "ran above"
        return ""


def is_here(name: str) -> bool:
    """Whether a program is there, or what torch has to bring."""
    if name in ("gpu", "a CUDA build of torch"):
        import torch

        return torch.cuda.is_available() if name == "gpu" else torch.version.cuda is not None
    return shutil.which(name, path=environment()["PATH"]) is not None


def quietly(*command: str) -> None:
    """Run what must succeed."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())

"""``tolaria build``: compile the extension for the torch that is installed, without a checkout."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
import time
from collections.abc import Iterator

from tolaria import _extension
from tolaria._build.into_cache import build_into_cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tolaria build``."""
    parser.description = (
        "Compile the extension for the torch and the Python that run this, into a cache that every later "
        "start finds: $TOLARIA_CACHE, else $XDG_CACHE_HOME/tolaria, else ~/.cache/tolaria. Needs a C++20 "
        "compiler and the Python headers; with a CUDA build of torch and a CUDA toolkit it compiles the CUDA "
        "kernels, too (TOLARIA_CUDA=1 insists, TOLARIA_CUDA=0 does without). Exit status: 0 if there is a "
        "build that fits, 1 with a sentence if not, 130 after Ctrl-C."
    )
    parser.add_argument("--force", action="store_true", help="build even if there is the very same build")
    parser.add_argument("--verbose", action="store_true", help="show the compilers' commands and output")


def run(arguments: argparse.Namespace) -> int:
    """Build, or say that there is nothing to do.

    Raises:
        BuildError: it cannot be built here; the message says what is missing.
    """
    started = time.monotonic()
    with _ended_in_order(), _Progress(arguments.verbose) as progress:
        built = build_into_cache(
            force=arguments.force,
            also=_extension.FOLDER if _extension.LOADED else None,
            say=progress.say,
            hear=progress.hear,
        )
    if not built.is_new:
        print(f"tolaria build: nothing to do, there is this very build in {built.folder}")
        return 0
    print(f"tolaria build: built in {time.monotonic() - started:.0f} s, in {built.folder}")
    return 0


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Signals that would end the process at once end the block, with the status that shells give them."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    former = {number: signal.signal(number, end) for number in signals}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class _Progress:
    """Tells how far the compilers are: on a terminal in one line that is written over."""

    def __init__(self, is_verbose: bool) -> None:
        self._is_verbose = is_verbose
        self._is_terminal = sys.stdout.isatty() and not is_verbose
        self._open = False

    def say(self, sentence: str) -> None:
        self._close()
        print(f"tolaria build: {sentence}", flush=True)

    def hear(self, line: str) -> None:
        if self._is_verbose:
            print(line, flush=True)
        step = re.match(r"\[(\d+)/(\d+)\] ", line)  # ninja's
        if step and self._is_terminal:
            print(f"\rtolaria build: {step[1]} of {step[2]} files", end="", flush=True)
            self._open = True

    def _close(self) -> None:
        if self._open:
            print(flush=True)
        self._open = False

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

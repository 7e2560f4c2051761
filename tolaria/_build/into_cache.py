"""Compile the extension for the torch that runs into the cache: all of it or nothing, one process at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch

from tolaria._build import cache, plan, sources
from tolaria._build.info import BuildInfo, read_build_info
from tolaria.errors import BuildError

TAIL = 40
"""Lines of a failed compiler's output that are shown."""
UNFINISHED = ".building-"
_PROBE = """
import importlib.machinery, importlib.util, sys, torch
spec = importlib.machinery.PathFinder.find_spec("tolaria._C", sys.argv[1:])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


@dataclass(frozen=True, kw_only=True)
class CachedBuild:
    """What :func:`build_into_cache` found or made."""

    folder: Path
    """Where the extension is."""
    info: BuildInfo
    """What it was built of and for."""
    is_new: bool
    """Whether it was built now."""


def build_into_cache(
    *,
    force: bool = False,
    also: Path | None = None,
    say: Callable[[str], None] = lambda sentence: None,
    hear: Callable[[str], None] = lambda line: None,
) -> CachedBuild:
    """Build the extension for the torch that runs, unless there is the very same build.

    It is compiled in a folder of its own and moved into place at the end, so that an interrupted build leaves
    nothing that could be taken for one; what a killed one left is removed by the next.

    Args:
        force: build in any case.
        also: a folder outside the cache where the same build may be, that of the package.
        say: is told what happens, in sentences.
        hear: is given every line of the compilers' output.

    Raises:
        BuildError: something is missing, the cache cannot be written to, or the compiler failed.
    """
    csrc = sources.csrc()
    if not csrc.is_dir():
        raise BuildError(f"expected the sources of the extension in {csrc}, found none; install tolaria anew")
    chosen = plan.make_plan()
    wanted = chosen.build_info(csrc)
    root = cache.cache_folder()
    if root is None:
        raise BuildError("expected a home directory for the cache, found none; set TOLARIA_CACHE to a folder")
    key = cache.build_key(torch.__version__, torch.version.cuda, sources.source_digest(csrc))
    place = root / "builds" / key

    if not force and (found := _same_build(wanted, place, also)):
        return found
    with _sole_builder(root, say) as unfinished:
        if not force and (found := _same_build(wanted, place, also)):  # by the process that we have waited for
            return found
        say(f"building {chosen.describe()}")
        _compile(unfinished, hear, say)
        with _writing(root):
            folder = _move_in(unfinished / "done", place)
    return CachedBuild(folder=folder, info=wanted, is_new=True)


def _same_build(wanted: BuildInfo, place: Path, also: Path | None) -> CachedBuild | None:
    """The newest build of the key, or that of the package, if it is the one that is wanted."""
    for folder in (*list(cache.numbered(place).values())[-1:], also):
        info = None if folder is None else read_build_info(folder)
        if folder is not None and info is not None and wanted.is_same_build(info):
            return CachedBuild(folder=folder, info=info, is_new=False)
    return None


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Says of the cache what keeps us from writing to it."""
    try:
        yield
    except OSError as error:
        raise BuildError(
            f"expected a cache folder that can be written to, got {root} ({error}); set TOLARIA_CACHE to another"
        ) from error


@contextlib.contextmanager
def _sole_builder(root: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """A folder to build in, while no other process builds; it is gone afterwards."""
    builds = root / "builds"
    with _writing(root):
        builds.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(root / ".lock")  # the system's: it goes with the process, however that ends
        try:
            held = lock.acquire(timeout=0)
        except filelock.Timeout:
            say("waiting for another `tolaria build`")
            held = lock.acquire()
    with held:
        with _writing(root):
            for left in builds.glob(f"{UNFINISHED}*"):
                shutil.rmtree(left, ignore_errors=True)
            unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=builds))
        try:
            yield unfinished
        finally:
            _remove(unfinished)


def _remove(folder: Path) -> None:
    """Remove a folder into which a compiler that is being stopped may write once more."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _compile(unfinished: Path, hear: Callable[[str], None], say: Callable[[str], None]) -> None:
    """Compile into ``unfinished/done``, and see that it loads."""
    done, objects = unfinished / "done", unfinished / "objects"
    for folder in (done, objects):
        folder.mkdir()
    path = os.pathsep.join(filter(None, [str(sources.PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(objects)}
    command = [sys.executable, "-m", "tolaria._build", str(done), str(objects)]
    status, lines = _listen(command, objects, environment, hear)
    if status != 0:
        say("\n".join(["the compiler's last lines:", *lines[-TAIL:]]))
        raise BuildError(
            f"expected the extension to compile, got exit status {status}; see the lines above, all of them with "
            "--verbose (a compiler that was killed for want of memory: MAX_JOBS=1)"
        )
    command = [sys.executable, "-c", _PROBE, str(done)]
    status, lines = _listen(command, objects, environment, hear)
    if status != 0:
        raise BuildError(
            f"expected an extension that loads, got {' '.join(lines[-1:]) or status}; "
            "build with the compiler and the libraries that this environment runs with"
        )


def _listen(
    command: list[str], folder: Path, environment: dict[str, str], hear: Callable[[str], None]
) -> tuple[int, list[str]]:
    """Run a command in a process group of its own, which does not outlive us; its status and its output."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            hear(lines[-1])
        return process.wait(), lines
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    finally:
        process.stdout.close()


def _move_in(done: Path, place: Path) -> Path:
    """Make a finished build the newest of its key; its predecessor stays, as a process may be opening it."""
    place.mkdir(exist_ok=True)
    former = cache.numbered(place)
    folder = place / str(max(former, default=0) + 1)
    done.rename(folder)
    for old in list(former.values())[:-1]:
        shutil.rmtree(old, ignore_errors=True)
    return folder

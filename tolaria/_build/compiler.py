"""The C++ compiler of this machine: is it there, what can it do, how many at once."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tolaria.errors import BuildError

OPENMP_PROBE = "#include <omp.h>\nint main() { return omp_get_max_threads() > 0 ? 0 : 1; }\n"
WITHOUT = "or do without: every op then runs in pure PyTorch (TOLARIA_BUILD=0 installs so)"


def find_compiler() -> list[str]:
    """The command of the C++ compiler: ``$CXX``, else the one Python was built with, else ``c++``.

    Raises:
        BuildError: no compiler, one that does not know C++20, or no Python headers to compile against.
    """
    named = os.environ.get("CXX")
    for command in (named,) if named else (sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"):
        words = shlex.split(command or "")
        words = words if named else words[:1]  # flags of Python's own build are setuptools' to add
        if words and shutil.which(words[0]):
            break
    else:
        what = f"CXX={named}, which is not on PATH" if named else "none on PATH"
        raise BuildError(f"expected a C++ compiler, found {what}; install g++ or clang++, {WITHOUT}")
    if not supports(words, "int main() {}\n", "-std=c++20"):
        got = describe(words)
        raise BuildError(f"expected a compiler for C++20, got {got}; point CXX at a newer one, {WITHOUT}")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        raise BuildError(f"expected the Python headers, found no {header}; install {package}, {WITHOUT}")
    return words


def describe(compiler: list[str]) -> str:
    """The first line of ``--version``."""
    done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).strip().split("\n")[0] or shlex.join(compiler)


def supports(compiler: list[str], source: str, *flags: str) -> bool:
    """Whether ``source`` compiles and links with ``flags``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source)
        command = [*compiler, str(path), "-o", str(path.with_suffix("")), *flags]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def openmp_flags(compiler: list[str]) -> list[str]:
    """The flags that give ``at::parallel_for`` its threads; without them it runs on one core."""
    return ["-fopenmp"] if supports(compiler, OPENMP_PROBE, "-fopenmp") else []


def _control_groups(root: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Folders of this process's control groups, from its own up, with their files of limits and of usage.

    What csrc/cpu/memory_limit.cpp reads; see there.
    """
    mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        is_version_2 = controllers == ""
        if not is_version_2 and "memory" not in controllers.split(","):
            continue
        for mount in mounts:
            before, _, behind = mount.partition(" - ")
            top, folder = before.split()[3:5]
            kind, _, options = behind.split()[:3]
            if kind != ("cgroup2" if is_version_2 else "cgroup"):
                continue
            if not is_version_2 and "memory" not in options.split(","):
                continue
            names = ("memory.max", "memory.high", "memory.current")
            is_shown = ".." not in group.split("/") and f"{group}/".startswith(f"{top.rstrip('/')}/")
            inside = Path(group).relative_to(top) if is_shown else Path()
            for path in (inside, *inside.parents):
                here = root / folder.lstrip("/") / path
                yield here, names if is_version_2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _free_gib(root: Path = Path("/")) -> float:
    """Memory free for compilers, as the system and the limits of a container say; infinite if unknown."""
    free = float("inf")
    with contextlib.suppress(OSError, ValueError):
        available = re.search(r"^MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
        if available is not None:
            free = int(available.group(1)) * 1024
    with contextlib.suppress(OSError, ValueError):
        for folder, (*limits, usage) in _control_groups(root):
            for limit in limits:
                with contextlib.suppress(OSError, ValueError):  # absent, or "max"
                    allowed = int((folder / limit).read_text())
                    free = min(free, allowed - int((folder / usage).read_text()))
    return free / 2**30


def max_jobs() -> int:
    """How many files to compile at once: one a core, and 2 GiB of free memory for each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, _free_gib() // 2)))

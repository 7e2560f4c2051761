"""The C++ compiler of this machine: is it there, what can it do, how many at once."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
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


def _free_gib() -> float:
    """Memory free for compilers, with the limit of a container taken into account; infinite if unknown."""
    free = float("inf")
    try:
        available = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if available is not None:
            free = int(available.group(1)) / 2**20
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit.isdigit():
            free = min(free, (int(limit) - int((group / "memory.current").read_text())) / 2**30)
    except OSError:
        pass
    return free


def max_jobs() -> int:
    """How many files to compile at once: one a core, and 2 GiB of free memory for each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, _free_gib() // 2)))

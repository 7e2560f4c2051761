"""Builds for other processors and by other compilers; compares what every op computes there with here.

    python build_tools/processors.py [--folder FOLDER] [PART...]

haswell, nehalem    the extension of this tree under qemu: AVX2 without AVX-512, and neither (x86-64 of 2008)
arm                 cross-built by Debian's g++, run by qemu with Debian's Python and a torch for aarch64 that
                    are fetched into FOLDER (1 GB); the tests of the ops, too
clang               built by clang++; clang-serial: where it has no OpenMP

All parts without a name. The extension is to be built in place first, and serves as the measure:
``result_hashes.py`` is run here and there. One whose programs are missing is skipped by name. The exit status
is 1 if a build had a warning, a result differed, or a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sanitize

ROOT = Path(__file__).resolve().parents[1]
HASHES = "build_tools/result_hashes.py"
ARM_TORCH = "torch==2.9.1"
"""The last whose wheel for aarch64 is one for the CPU; those of later ones want the libraries of CUDA."""
ARM_TESTS = tuple(
    f"tests/ops/test_{name}.py"
    for name in ("governor", "magnitude", "memory_limit", "snapshot", "stats", "straight_through")
)
"""Those of the ops that do not take an emulator half an hour."""
ARM_CANNOT = "real_control_group"
"""Which of them start a Python of their own: this machine cannot, where only qemu's own name runs it."""
DEBIAN = ("python3", "libpython3-dev", "libgomp1", "libstdc++6")
WHEELS = ("pytest", "pytest-benchmark", "hypothesis", "expecttest", "numpy", "setuptools>=77")
TORCH_NEEDS = ("sympy", "networkx", "jinja2", "fsspec", "filelock", "typing_extensions")
CLOSE = 1e-8
"""How far a loss sum may be off, relative, where the processor has no fused multiply-add."""

Results = dict[str, dict[str, Any]]


@dataclass
class Finding:
    """What became of a part."""

    part: str
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """A line."""
        verdict = "FAILED: " + "; ".join(self.failures) if self.failures else "passed"
        return f"{self.part}: {verdict}{': ' if self.notes else ''}{', '.join(self.notes)}"


def run(command: Sequence[str | Path], **options: Any) -> str:  # noqa: ANN401
    """Run a program and return what it said; a failure ends the part with its last words."""
    said = subprocess.run([*map(str, command)], text=True, capture_output=True, check=False, **options)
    if said.returncode != 0:
        tail = "\n".join((said.stdout + said.stderr).strip().splitlines()[-30:])
        raise PartError(f"{Path(command[0]).name} ended with status {said.returncode}:\n{tail}")
    return said.stdout + said.stderr


class PartError(Exception):
    """A part could not be carried through."""


def results(python: Sequence[str | Path], tree: Path, environment: dict[str, str] | None = None) -> Results:
    """What the ops of ``tree`` compute, run by ``python``."""
    settings = dict(os.environ, PYTHONPATH=str(tree), OMP_NUM_THREADS="1") | (environment or {})
    said = subprocess.run(
        [*map(str, python), HASHES], cwd=tree, env=settings, text=True, capture_output=True, check=False
    )
    if said.returncode != 0:
        raise PartError(f"{HASHES} ended with status {said.returncode}: {said.stderr.strip()[-2000:]}")
    found: Results = json.loads(said.stdout)
    return found


def compare(here: Results, there: Results, finding: Finding) -> None:
    """Whether two sets of results agree: bits, and for the bounded ones values."""
    exact = [name for name in here["exact"] if here["exact"][name] != there["exact"].get(name)]
    exact += [f"{name} (only there)" for name in there["exact"].keys() - here["exact"].keys()]
    if exact:
        finding.failures.append(
            f"{len(exact)} of {len(here['exact'])} results differ: {', '.join(exact[:20])}"
        )
    else:
        finding.notes.append(f"{len(here['exact'])} results equal bit for bit")
    off = {name: abs(there["bounded"].get(name, 0) / value - 1) for name, value in here["bounded"].items()}
    far = [f"{name} is off by {by:.1e}" for name, by in off.items() if not by <= CLOSE]  # or NaN
    if far:
        finding.failures.append(", ".join(far))
    else:
        same = sum(not by for by in off.values())
        finding.notes.append(f"{same} of {len(off)} sums of metrics equal, {max(off.values()):.1g} off")


def missing(*programs: str) -> str | None:
    """The first that is not on PATH."""
    return next((name for name in programs if shutil.which(name) is None), None)


def build(tree: Path, python: Sequence[str | Path], settings: dict[str, str], finding: Finding) -> None:
    """Build the extension of a copy of this tree in place; a warning of ours is a failure."""
    sanitize.copy_tree(tree)
    environment = dict(os.environ, TOLARIA_CUDA="0", **settings)
    said = run([*python, "setup.py", "build_ext", "--inplace"], cwd=tree, env=environment)
    warnings = [line for line in said.splitlines() if "warning:" in line and "csrc/" in line]
    if warnings:
        finding.failures.append(f"{len(warnings)} warnings, first: {warnings[0]}")
    finding.notes.append("built without a warning" if not warnings else "built")


def emulated(model: str) -> Callable[[Path, Results, Finding], None]:
    """The part that runs this tree's extension on another x86-64."""

    def part(_: Path, here: Results, finding: Finding) -> None:
        compare(here, results(["qemu-x86_64", "-cpu", model, sys.executable], ROOT), finding)

    return part


def clang(folder: Path, here: Results, finding: Finding) -> None:
    """The part that builds with clang++."""
    build(folder / "clang", [sys.executable], {"CXX": "clang++"}, finding)
    compare(here, results([sys.executable], folder / "clang"), finding)


def clang_serial(folder: Path, here: Results, finding: Finding) -> None:
    """The same by one that knows no OpenMP."""
    folder.mkdir(parents=True, exist_ok=True)
    wrapper = folder / "clang++-without-openmp"
    wrapper.write_text('#!/bin/sh\ncase " $* " in *" -fopenmp "*) exit 1 ;; esac\nexec clang++ "$@"\n')
    wrapper.chmod(0o755)
    build(folder / "clang-serial", [sys.executable], {"CXX": str(wrapper)}, finding)
    compare(here, results([sys.executable], folder / "clang-serial"), finding)


def fetch_debian(folder: Path) -> Path:
    """A root with Debian's Python for arm64, unpacked, not installed; nothing of this machine changes."""
    root, apt = folder / "root", folder / "apt"
    if (root / "usr/bin/python3").exists():
        return root
    for name in ("state/lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    options = {
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "APT::Architecture": "arm64",
        "APT::Architectures::": "arm64",
        "APT::Sandbox::User": "root",
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    subprocess.run(
        ["apt-get", *words, "update"], capture_output=True, check=False
    )  # some source may lack arm64
    run(["apt-get", *words, "install", "--download-only", "--no-install-recommends", "-y", *DEBIAN])
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        run(["dpkg-deb", "-x", package, root])
    return root


def fetch_wheels(folder: Path, version: str) -> Path:
    """A folder with torch and what the tests need, for aarch64."""
    site = folder / "site"
    if not (site / "torch").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--target", site]
        pip += ["--python-version", version, "--implementation", "cp", "--no-warn-conflicts"]
        for platform in ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"):
            pip += ["--platform", platform]
        run([*pip, *WHEELS, *TORCH_NEEDS])
        run([*pip, "--no-deps", "--upgrade", ARM_TORCH])  # by itself: its wheel names no library of CUDA
    return site


def arm(folder: Path, here: Results, finding: Finding) -> None:
    """The part that builds for aarch64 and runs there, in a Python that qemu emulates.

    The build is setup.py's own: the emulated Python says what its torch and its headers are, and starts the
    cross compiler, which is a program of this machine.
    """
    root = fetch_debian(folder / "arm")
    python = ["qemu-aarch64", "-L", root, root / "usr/bin/python3"]
    version = run([*python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).strip()
    site, tree = fetch_wheels(folder / "arm", version), folder / "arm/tree"
    headers = folder / "arm/headers"  # not those of the C library, which the cross compiler has
    headers.mkdir(exist_ok=True)
    if not (headers / "aarch64-linux-gnu").exists():
        (headers / "aarch64-linux-gnu").symlink_to(root / "usr/include/aarch64-linux-gnu")
    settings = {
        "CXX": "aarch64-linux-gnu-g++",
        "CC": "aarch64-linux-gnu-gcc",
        "LDSHARED": "aarch64-linux-gnu-g++ -shared",
        "CPATH": f"{root}/usr/include/python{version}:{headers}",
        "PYTHONPATH": str(site),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # ninja, of this machine
    }
    build(tree, python, settings, finding)
    environment = {"PYTHONPATH": f"{tree}:{site}"}
    compare(here, results(python, tree, environment), finding)
    tests = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests += ["-m", "not slow and not cuda", "-k", f"not {ARM_CANNOT}", *ARM_TESTS]
    said = run(tests, cwd=tree, env=dict(os.environ, OMP_NUM_THREADS="1", **environment))
    finding.notes.append(f"tests of the ops: {said.strip().splitlines()[-1].strip('= ')}")


PARTS: dict[str, tuple[Callable[[Path, Results, Finding], None], tuple[str, ...]]] = {
    "haswell": (emulated("Haswell"), ("qemu-x86_64",)),
    "nehalem": (emulated("Nehalem"), ("qemu-x86_64",)),
    "clang": (clang, ("clang++",)),
    "clang-serial": (clang_serial, ("clang++",)),
    "arm": (arm, ("qemu-aarch64", "aarch64-linux-gnu-g++", "apt-get", "dpkg-deb")),
}
"""Each part and the programs that it needs."""


def check(part: str, folder: Path, here: Callable[[], Results]) -> Finding:
    """Carry out a part; what goes wrong is a failure of this one alone."""
    finding, (body, programs) = Finding(part), PARTS[part]
    if (absent := missing(*programs)) is not None:
        finding.notes.append(f"SKIPPED, there is no {absent}")
        return finding
    try:
        body(folder, here(), finding)
    except PartError as error:
        finding.failures.append(str(error))
    return finding


def main() -> int:
    """Read the arguments, carry out the parts, say what came of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; default: all")
    parser.add_argument("--folder", type=Path, help="what is fetched and built is kept here for the next run")
    given = parser.parse_args()
    if unknown := set(given.parts) - PARTS.keys():
        parser.error(f"PART: expected any of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    known: list[Results] = []

    def here() -> Results:
        if not known:
            known.append(results([sys.executable], ROOT))
        return known[0]

    with tempfile.TemporaryDirectory(prefix="tolaria-processors-") as scratch:
        folder = (given.folder or Path(scratch)).resolve()
        findings = []
        for part in given.parts or PARTS:
            findings.append(check(part, folder, here))
            print(f"processors: {findings[-1]}", flush=True)
    failed = [finding.part for finding in findings if finding.failures]
    print(f"processors: {len(findings) - len(failed)} of {len(findings)} parts passed or skipped")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

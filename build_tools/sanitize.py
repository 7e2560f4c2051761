"""Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer; runs tests and a fuzz in it.

    python build_tools/sanitize.py [--calls 20000] [--only address|undefined] [--folder FOLDER] [TEST...]

Needs GCC on Linux and an environment with torch and the test requirements. The tree is copied first, so the
extension built in place stays what it is; ``--folder`` keeps that copy, and the next run builds only what has
changed. The exit status is 1 if there was any report, or if a test or the fuzz failed.

What would hide a fault is off in these builds (``TOLARIA_SANITIZE`` in csrc): outputs do not come from the
pool, and streamed stores, which AddressSanitizer does not see, are ordinary ones. The pool's own tests run
once more with ``TOLARIA_SANITIZE_POOL=1``, which brings it back with its idle memory poisoned.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["tests/ops", "tests/snapshot", "tests/telemetry", "tests/governor"]
POOL_TESTS = ["tests/ops/test_output_pool.py"]
KINDS = ("address", "undefined")

# Behind all other flags, so that they win. -O1 keeps what the source says apart, and its lines known.
FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-DTOLARIA_SANITIZE"]
SANITIZERS = {
    "address": ["-fsanitize=address"],
    # vptr asks for type information that torch does not export. Division by zero is IEEE arithmetic here.
    "undefined": ["-fsanitize=undefined,float-cast-overflow", "-fno-sanitize=vptr"],
}
OPTIONS = {
    # Python never frees all; torch maps memory where the gap of the shadow would be, and refuses by itself
    # what is too large.
    "ASAN_OPTIONS": ":".join(
        (
            "detect_leaks=0",
            "protect_shadow_gap=0",
            "allocator_may_return_null=1",
            "detect_stack_use_after_return=1",
            "handle_segv=1",
        )
    ),
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=0",
}
SUPPRESSIONS = ""  # none: nothing of torch's is reported (a line here needs its reason)


def copy_tree(folder: Path) -> None:
    """Copy what git tracks or would; what is there unchanged stays, since its age decides what is built."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"],
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        source, target = ROOT / name, folder / name
        if not name or not source.is_file():
            continue
        if not target.is_file() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def write_compiler(folder: Path, kinds: list[str]) -> Path:
    """A compiler that adds the flags: no build system has to know them."""
    flags = [*FLAGS, *(flag for kind in kinds for flag in SANITIZERS[kind])]
    path = folder / "sanitizing-g++"
    path.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" {" ".join(flags)}\n')
    path.chmod(0o755)
    return path


def runtime(name: str) -> str:
    """Where the compiler has a library."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def environment(folder: Path, kinds: list[str]) -> dict[str, str]:
    """What the programs under test run in."""
    settings = dict(
        os.environ, PYTHONPATH=str(folder), OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "2")
    )
    for name, options in OPTIONS.items():
        settings[name] = f"{options}:log_path={folder / 'reports' / name[:2].lower()}"
    if "address" in kinds:  # its runtime comes first, and finds the exceptions that it intercepts
        settings["LD_PRELOAD"] = " ".join([runtime("libasan.so"), runtime("libstdc++.so.6")])
    return settings


def programs(tests: list[str], calls: int) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """What is run: a name, a command, and what its environment has beside."""
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not cuda and not multi_gpu",
    ]
    others = [f"--ignore={path}" for path in POOL_TESTS]
    yield "tests", [*pytest, *others, *tests], {"CI": "1"}
    if tests == TESTS:
        yield "tests of the pool", [*pytest, *POOL_TESTS], {"CI": "1", "TOLARIA_SANITIZE_POOL": "1"}
    if calls:
        yield "fuzz", [sys.executable, "build_tools/fuzz_arguments.py", "--calls", str(calls)], {}


def sanitize(folder: Path, kinds: list[str], tests: list[str], calls: int) -> int:
    """Build, run, count; the exit status."""
    copy_tree(folder)
    shutil.rmtree(folder / "reports", ignore_errors=True)
    (folder / "reports").mkdir()
    began = time.monotonic()
    compiling = dict(os.environ, CXX=str(write_compiler(folder, kinds)), TOLARIA_CUDA="0")
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder, env=compiling, check=True
    )
    said = [f"build with {' and '.join(kinds)}: {time.monotonic() - began:.0f} s"]
    failed = False
    for name, command, beside in programs(tests, calls):
        began = time.monotonic()
        done = subprocess.run(command, cwd=folder, env=environment(folder, kinds) | beside, check=False)
        failed |= done.returncode != 0
        verdict = "passed" if done.returncode == 0 else f"FAILED with status {done.returncode}"
        said.append(f"{name}: {verdict}, {time.monotonic() - began:.0f} s")
    reports = [path for path in sorted((folder / "reports").iterdir()) if path.stat().st_size]
    for path in reports:
        print(f"\n{path.name}\n{path.read_text(errors='replace')[:6000]}")
    for line in said:
        print(f"sanitize: {line}")
    print(f"sanitize: {len(reports)} processes reported something")
    return int(failed or bool(reports))


def main() -> None:
    """Parse the arguments and exit with the status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=KINDS, help="one sanitizer rather than both")
    parser.add_argument("--calls", type=int, default=20_000, help="fuzzed calls (default 20000; 0: none)")
    parser.add_argument(
        "--folder", type=Path, help="where to copy the tree and build; kept (default: temporary)"
    )
    parser.add_argument("tests", nargs="*", default=TESTS, metavar="TEST", help=f"default: {' '.join(TESTS)}")
    chosen = parser.parse_args()
    kinds = [chosen.only] if chosen.only else list(KINDS)
    if chosen.folder is not None:
        chosen.folder.mkdir(parents=True, exist_ok=True)
        sys.exit(sanitize(chosen.folder.resolve(), kinds, chosen.tests, chosen.calls))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(sanitize(Path(folder), kinds, chosen.tests, chosen.calls))


if __name__ == "__main__":
    main()

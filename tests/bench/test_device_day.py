"""The script for the day a GPU comes, with stand-ins for Python and compute-sanitizer."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "device_day.sh"
H200 = "1 9.0 0 NVIDIA H200, 16 processors"
# Options of compute-sanitizer 2025.3.1 (CUDA 13.0) that the script may use, and those of one tool alone.
OPTIONS = {"--tool", "--error-exitcode", "--launch-timeout", "--print-limit", "--kernel-name"}
OPTIONS_OF = {"memcheck": {"--report-api-errors"}}

PYTHON = r"""#!/usr/bin/env bash
echo "python $* [$TORCH_CUDA_ARCH_LIST|$TOLARIA_REQUIRE_CUDA]" >>"$CALLS"
case "$*" in
  *"device_facts.py machine") echo "$MACHINE" ;;
  *"device_facts.py extension") [ -e "$CALLS.built" ] && echo "for CUDA 9.0" || exit 1 ;;
  *"device_facts.py lacks"*) for name in $LACKS; do case " $* " in *" $name "*) echo "$name" ;; esac; done ;;
  *setup.py*) touch "$CALLS.built"; echo compiled; exit "${BUILD_STATUS:-0}" ;;
  *every_kernel.py*) echo "every kernel: 9 results, 0 wrong"; exit "${KERNELS_STATUS:-0}" ;;
  *"-m pytest"*) echo "half of it"; [ -z "${SLOW:-}" ] || exec sleep "$SLOW"; echo "== 7 passed in 1s ==" ;;
  *run.py*) while [ "$1" != --out ]; do shift; done; mkdir -p "$2"; echo "{}" >"$2/bench.json" ;;
esac
"""
SANITIZER = r"""#!/usr/bin/env bash
echo "compute-sanitizer $* [$PYTORCH_NO_CUDA_MEMORY_CACHING]" >>"$CALLS"
echo "========= ERROR SUMMARY: 0 errors"
case "$*" in *"$FAULTY"*) exit 9 ;; esac
"""


@pytest.fixture
def day(tmp_path):
    """A function that starts the script; what it calls is in ``calls``, what it writes in ``out``."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def start(
        machine: str = H200, *, with_sanitizer: bool = True, **environment: str
    ) -> subprocess.Popen[str]:
        if not with_sanitizer:
            (tools / "compute-sanitizer").unlink()
        for name in ("TORCH_CUDA_ARCH_LIST", "TOLARIA_REQUIRE_CUDA", "OUT", "DAY_TESTS"):
            environment.setdefault(name, "")
        paths = f"{tools}:/usr/bin:/bin"
        return subprocess.Popen(
            ["bash", str(SCRIPT), str(tmp_path / "out")],
            env={
                **{"PATH": paths, "PYTHON": str(tools / "python"), "CALLS": str(tmp_path / "calls")},
                **{"MACHINE": machine, "LACKS": "", "FAULTY": "nothing", "CUDA_HOME": str(tmp_path)},
                **{name: value for name, value in environment.items() if value},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start


def summary(tmp_path: Path) -> str:
    return (tmp_path / "out" / "summary.txt").read_text()


def calls(tmp_path: Path, what: str) -> list[str]:
    return [line for line in (tmp_path / "calls").read_text().splitlines() if what in line]


def test_it_is_short_and_its_budgets_fit_nine_minutes():
    lines = SCRIPT.read_text().splitlines()
    assert len(lines) <= 150
    assert "total=${DAY_SECONDS:-530}" in "\n".join(lines)


def test_on_a_gpu_everything_runs(day, tmp_path):
    process = day()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert said == summary(tmp_path)
    assert "FAILED" not in said
    assert "SKIPPED" not in said
    assert said.splitlines()[-1].startswith("device day: passed on NVIDIA H200")
    assert "build: passed: for CUDA 9.0" in said
    assert "tests: passed: -m 'cuda and not multi_gpu' tests: 7 passed in 1s" in said
    assert all("[9.0|1]" in line for line in calls(tmp_path, "-m pytest") + calls(tmp_path, "setup.py"))
    benches = {path.stem for path in ROOT.glob("bench/*/bench_*.py")}
    assert {line.split()[-2] for line in calls(tmp_path, "run.py")} == benches
    assert all("--quick --device cuda" in line for line in calls(tmp_path, "run.py"))
    # No more than comes back from a device machine: 8 files.
    files = {path.name for path in (tmp_path / "out").iterdir()}
    parts = ("build", "kernels", "tests", "sanitize", "bench")
    assert files == {"summary.txt", "bench.tar.gz", *(f"{part}.log" for part in parts)}


def test_compute_sanitizer_is_called_as_it_wants(day, tmp_path):
    day().communicate(timeout=60)
    found = calls(tmp_path, "compute-sanitizer --tool")
    tools = [line.split()[2] for line in found]
    assert sorted(tools) == ["initcheck", "memcheck", "racecheck", "synccheck"]
    for tool, line in zip(tools, found, strict=True):
        options, program = line.split(str(tmp_path), 1)
        assert {word for word in options.split() if word.startswith("--")} <= OPTIONS | OPTIONS_OF.get(
            tool, set()
        )
        assert program.endswith("bench/every_kernel.py --device cuda [1]")
        # It marks as written what the kernels that it sees have written: of torch's, too.
        assert ("--kernel-name" in line) == (tool != "initcheck")


def test_a_finding_of_one_tool_fails_and_the_rest_runs(day, tmp_path):
    process = day(FAULTY="--tool racecheck")
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "sanitize: racecheck status 9, ERROR SUMMARY: 0 errors;" in said
    assert "sanitize: FAILED" in said
    assert "bench: passed" in said
    assert len(calls(tmp_path, "compute-sanitizer --tool")) == 4


@pytest.mark.parametrize(
    ("machine", "markers", "effort"),
    [
        ("0 - 0 no CUDA device", "cuda or multi_gpu", "--smoke --device cpu"),
        ("1 8.0 1 Virtual CUDA Device", "cuda and not multi_gpu", "--smoke --device cuda"),
        ("2 9.0 0 NVIDIA H200", "cuda or multi_gpu", "--quick --device cuda"),
    ],
)
def test_what_a_machine_has_decides(day, tmp_path, machine, markers, effort):
    process = day(machine)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert f"-m '{markers}'" in said
    assert all(effort in line for line in calls(tmp_path, "run.py"))
    if machine.startswith("0"):
        assert "sanitize: SKIPPED: compute-sanitizer has no CUDA device to look at" in said
        assert all("[|]" in line for line in calls(tmp_path, "python"))


def test_what_is_missing_is_named(day):
    process = day(LACKS="pytest_benchmark", with_sanitizer=False)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert "sanitize: SKIPPED: there is no compute-sanitizer" in said
    assert "tests: passed" in said
    assert "bench: SKIPPED: there is no pytest_benchmark" in said


def test_without_pytest_the_kernels_are_checked(day):
    process = day(LACKS="pytest")
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert "kernels: passed: every kernel: 9 results, 0 wrong" in said
    assert "tests: SKIPPED: there is no pytest" in said
    assert "sanitize: passed" in said
    assert "bench: SKIPPED: there is no pytest" in said


def test_a_failed_build_ends_it(day, tmp_path):
    process = day(BUILD_STATUS="1")
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "build: FAILED: compiled" in said
    assert "device day: FAILED, there is nothing to run" in said
    assert not calls(tmp_path, "every_kernel")


def test_a_wrong_kernel_fails(day):
    process = day(KERNELS_STATUS="1")
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "kernels: FAILED: every kernel: 9 results, 0 wrong" in said
    assert said.splitlines()[-1].startswith("device day: FAILED on NVIDIA H200")


def test_the_whole_has_an_end(day, tmp_path):
    process = day(SLOW="60", DAY_SECONDS="4")
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 1
    assert "tests: CUT OFF: -m 'cuda and not multi_gpu' tests: half of it" in said
    assert "bench: CUT OFF" in said
    assert "no time is left" in (tmp_path / "out" / "bench.log").read_text()


def test_what_is_known_stays_when_it_is_killed(day, tmp_path):
    process = day(SLOW="20")
    deadline = time.monotonic() + 30
    while "half of it" not in (read_if_there(tmp_path / "out" / "tests.log")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)
    for line in ("kernels: passed", "tests: begun"):
        assert line in summary(tmp_path)
    assert "half of it" in (tmp_path / "out" / "tests.log").read_text()


def read_if_there(path: Path) -> str:
    return path.read_text() if path.is_file() else ""

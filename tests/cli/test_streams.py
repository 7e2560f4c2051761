"""Standard streams that are closed, full or gone: a status, at most one sentence, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tolaria

QUICK = "train --steps 4 --threads 1 --no-plot --quiet --out run"


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(tolaria.__file__).parents[1]),
    }
    environment.pop("PYTHONUNBUFFERED", None)  # with it argparse swallows the error
    command = command.replace("tolaria ", f"'{sys.executable}' -m tolaria ")
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("tolaria doctor >&-", 0),
        ("tolaria --help >&-", 0),
        ("tolaria doctor 2>&- >&-", 0),
        (f"tolaria {QUICK} <&- >&- 2>&-", 0),
        (f"tolaria {QUICK} --json >&-", 0),
        ("tolaria train digts 2>&-", 2),
    ],
)
def test_closed_streams_lead_nowhere(tmp_path, command, status):
    done = shell(command, tmp_path)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr


def test_files_of_a_run_do_not_get_a_closed_streams_number(tmp_path):
    assert shell(f"tolaria {QUICK.replace('--quiet ', '')} >&- 2>&-", tmp_path).returncode == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(line.startswith("{") for line in lines)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["tolaria doctor >/dev/full", "tolaria --version >/dev/full"])
def test_full_disk_is_one_sentence(tmp_path, command):
    done = shell(command, tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"{done.stderr.split(':')[0]}: [Errno 28] No space left on device"]


def test_reader_that_leaves_is_no_error(tmp_path):
    done = shell("tolaria train --help | head -1; exit ${PIPESTATUS[0]}", tmp_path)
    assert done.returncode in (0, 141)
    assert done.stderr == ""

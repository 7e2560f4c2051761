"""Runs that are killed while they train and save."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import tolaria

STORM = Path(__file__).resolve().parents[1] / "kill_storm.py"


def test_what_a_killed_run_leaves_goes_on_bit_for_bit(tmp_path: Path) -> None:
    command = [sys.executable, str(STORM), "--kills", "12", "--folder", str(tmp_path)]
    tested = os.environ | {"PYTHONPATH": str(Path(tolaria.__file__).parents[1])}
    done = subprocess.run(command, env=tested, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 kills" in done.stdout
    assert int(done.stdout.split("kills, ")[1].split()[0]) < 12, "every one was killed before it saved"

"""The suite on a machine that lacks what is optional: what needs it is skipped by name, the rest runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LACKING = """
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
names = set("hypothesis _hypothesis_pytestplugin expecttest matplotlib rich safetensors sklearn".split())
names |= set("tensorboard pytest_benchmark river ignite trainpulse lightning_fabric torchmetrics".split())
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in names else find_spec(name, *rest)
"""


def run(folder: Path, *arguments: str) -> str:
    """pytest in a process that cannot see those packages, nor any plugin; everything must be right."""
    (folder / "lacking.py").write_text(LACKING)
    paths = os.pathsep.join([str(folder), *filter(None, sys.path)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "lacking", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout


def test_everything_can_be_collected(tmp_path):
    said = run(tmp_path, "--collect-only", "tests")
    assert "error" not in said.splitlines()[-1]


def test_property_tests_are_skipped_by_name_and_others_run(tmp_path):
    said = run(tmp_path, "tests/nn/test_schedule.py")
    assert "needs hypothesis, which is not installed" in said
    assert " passed" in said.splitlines()[-1]


def test_what_needs_a_package_is_skipped_by_name(tmp_path):
    said = run(
        tmp_path, "tests/runs/test_storage.py", "tests/runs/test_run_folder.py", "tests/runs/test_plot.py"
    )
    for name in ("safetensors", "matplotlib", "sklearn"):
        assert f"needs {name}, which is not installed" in said or f"could not import '{name}" in said

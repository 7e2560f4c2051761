"""Ctrl-C in a process of its own, where only a process of its own can show what a user sees."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

ENTRY = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nimport sys; sys.argv = {argv}\n"
)
PRESS = "import signal; signal.raise_signal(signal.SIGINT)"


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Under the handler of a shell's foreground job, whatever started the tests."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("name", ["-m", "/usr/bin/tolaria"])
def test_interrupted_import_prints_nothing(name):
    press = f"""
import importlib.abc
class Press(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, *_):
        if fullname == "torch":
            {PRESS}
sys.meta_path.insert(0, Press())
import tolaria
"""
    done = run(ENTRY.format(argv=[name, "train"]) + press)
    assert done.returncode == -signal.SIGINT
    assert done.stdout + done.stderr == ""


def test_other_programs_keep_their_handler():
    done = run(ENTRY.format(argv=["mine.py"]) + "import tolaria\nassert not tolaria._startup.changed")
    assert done.returncode == 0, done.stderr


def test_interrupted_exit_prints_nothing():
    code = f"""
from tolaria.cli.main import shell_command
import atexit, signal
@atexit.register
def press():
    {PRESS}
shell_command()
"""
    done = run(ENTRY.format(argv=["/usr/bin/tolaria", "--version"]) + code)
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""


def test_key_pressed_while_a_finished_run_is_saved(tmp_path, monkeypatch, capsys):
    from tolaria.cli.main import main
    from tolaria.runs import folder

    save = folder.save_model

    def pressed(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        save(*arguments, **options)

    monkeypatch.setattr(folder, "save_model", pressed)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = main(["train", "--steps", "4", "--no-plot", "--quiet", "--out", str(tmp_path / "run")])
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130
    assert "complete" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["interrupted"] is False

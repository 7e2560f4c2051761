"""Two runs into one folder, runs over a former run, and what a run folder's files have in common."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import tolaria
from tolaria.cli.main import main
from tolaria.errors import FolderInUseError
from tolaria.runs import RunFolder, default_folder, load_model, read_lines, run_task
from tolaria.runs.files import FolderLock, write_whole
from tolaria.train import GrowthObserver

QUICK = {"steps": 4, "threads": 1, "plot": False}


class During(GrowthObserver):
    """Does something in the middle of a run."""

    def __init__(self, act) -> None:
        self.act, self.done = act, False

    def on_step(self, record) -> None:
        if not self.done:
            self.done = True
            self.act()


def test_second_run_into_a_folder_is_refused_and_the_first_goes_on(tmp_path, capsys):
    out = tmp_path / "run"

    def second() -> None:
        for more in ([], ["--overwrite"]):
            assert main(["train", "--steps", "4", "--no-plot", "--out", str(out), *more]) == 2
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()} on "):
            run_task("digits", out=out, overwrite=True, **QUICK)

    run_task("digits", out=out, observers=[During(second)], **QUICK)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(f"process {os.getpid()} on " in line and "another folder" in line for line in said)
    assert len([line for line in read_lines(out / "metrics.jsonl") if line["kind"] == "step"]) == 4
    assert not (out / ".lock").exists()
    load_model(out)
    run_task("digits", out=out, overwrite=True, **QUICK)


def test_runs_that_start_at_the_same_moment_do_not_share_a_folder(tmp_path):
    folders = [RunFolder(tmp_path / "run", plot=False) for _ in range(2)]  # both saw it empty

    class Context(GrowthObserver):
        def on_start(self, context) -> None:
            with pytest.raises(FolderInUseError):
                folders[1].on_start(context)

    from tolaria.train import grow

    grow("digits", observers=[folders[0], Context()], host_steps=1, blend_steps=1, max_germinations=0)


def test_a_killed_run_leaves_no_claim(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from tolaria.runs.files import FolderLock\n"
        "FolderLock(Path(sys.argv[1])).acquire(); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(tolaria.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment)
    assert (tmp_path / ".lock").exists()
    run_task("digits", out=tmp_path, **QUICK)  # it is empty, and nobody's
    assert not (tmp_path / ".lock").exists()


def test_run_that_fails_leaves_no_claim(tmp_path):
    def fail() -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        run_task("digits", out=tmp_path, observers=[During(fail)], **QUICK)
    run_task("digits", out=tmp_path, overwrite=True, **QUICK)


def test_overwriting_removes_the_former_run_before_anything_is_written(tmp_path):
    run_task("digits", out=tmp_path, steps=4, threads=1, inject=["nan-loss@2"])
    (tmp_path / "mine.txt").write_text("kept")
    seen: list[set[str]] = []
    look = During(lambda: seen.append({path.name for path in tmp_path.iterdir()}))
    run_task("digits", out=tmp_path, overwrite=True, observers=[look], **QUICK)
    assert [names - {"snapshots"} for names in seen] == [
        {"config.json", "metrics.jsonl", "events.jsonl", "mine.txt", ".lock"}
    ]
    assert not (tmp_path / "run.png").exists()  # that was the former run's


def test_a_lock_is_released_once_and_only_by_its_owner(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    second.release()
    with pytest.raises(FolderInUseError):
        second.acquire()
    first.release()
    first.release()
    second.acquire()
    second.release()
    first.check()


def test_default_folders_of_processes_differ(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    first = default_folder("digits")
    first.mkdir(parents=True)
    assert default_folder("digits") != first
    monkeypatch.setattr(os, "getpid", lambda: 7)
    assert default_folder("digits").name.endswith("-7")


def test_files_of_a_run_have_one_mode(tmp_path):
    before = os.umask(0o026)
    try:
        run_task("digits", out=tmp_path / "run", steps=4, threads=1)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").iterdir()}
    assert len(modes) == 7
    assert set(modes.values()) == {0o640}


def test_failed_write_leaves_the_former_file_and_no_draft(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", b"former")
    for name in ("write", "fsync", "replace"):

        def fail(*_: object) -> None:
            raise OSError("no")

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="no"):
                write_whole(tmp_path / "file", b"latter")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        assert (tmp_path / "file").read_bytes() == b"former"

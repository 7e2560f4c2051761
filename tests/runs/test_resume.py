"""A run that is ended anywhere and resumed is, bit for bit, the run that nothing ended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tolaria
from tolaria.cli.main import main
from tolaria.errors import FolderInUseError, SnapshotError
from tolaria.governor import GovernorEvent
from tolaria.nn import CNNHost
from tolaria.runs import RunFolder, read_lines, resume_task, run_task
from tolaria.runs.files import FolderLock
from tolaria.tasks import TaskSpec, get_task
from tolaria.train import GrowthObserver, GrowthResult, StepRecord

FILES = ("metrics.jsonl", "model.safetensors", "model.json")
EAGER: dict[str, Any] = {"threads": 1, "plot": False, "governor_options": {"snapshot_interval": 5}}
PHASES = {"host_steps": 40, "incubate_steps": 40, "blend_steps": 40, "finish_steps": 30}
FORGETFUL = replace(
    get_task("digits"), name="forgetful", model_factory=lambda: CNNHost(widths=(8, 16), dropout=0.2)
)
RUNS: dict[str, dict[str, Any]] = {
    "kept": {
        **EAGER, **PHASES, "validate_every": 16, "min_gain": -1e9, "inject": ["spike@25", "nan-loss@132"],
    },
    "dropped": {
        **EAGER, **PHASES, "max_germinations": 3, "inject": ["nan-loss@52", "nan-buffer@110"],
        "governor_options": {"snapshot_interval": 5, "lr_factor": 0.5, "restore_rng": True},
    },
    "culled": {**EAGER, **PHASES, "accumulation_steps": 2, "min_gain": 1e9},
    "unguarded": {"threads": 1, "plot": False, "use_governor": False, **PHASES, "validate_every": 10},
    "forgetful": {**EAGER, **PHASES, "task": FORGETFUL},
    "drawing": {
        **EAGER, "task": "text", "host_steps": 12, "incubate_steps": 12, "blend_steps": 12, "finish_steps": 4,
        "blueprint": "mlp", "blueprint_options": {"dropout": 0.3},
    },
}  # fmt: skip


def spec(name: str) -> TaskSpec | None:
    task = RUNS[name].get("task")
    return task if isinstance(task, TaskSpec) else None


class Ender(GrowthObserver):
    """Ends the run after a step; until then every state is waited for, so that none is passed over."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_events(self, events: Sequence[GovernorEvent]) -> None:
        for thread in threading.enumerate():
            if thread.name == "tolaria-save":
                thread.join()

    def on_step(self, record: StepRecord) -> None:
        if record.step == self.after:
            self.end()

    def end(self) -> None:
        raise KeyboardInterrupt


def interrupted(out: Path, after: int, **settings: Any) -> GrowthResult:
    return run_task(out=out, observers=[Ender(after)], **settings)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


def told(folder: Path) -> list[str]:
    """What was told, in any order; not when, nor of the layout of slots, which a resume makes anew."""
    lines = [e for e in read_lines(folder / "events.jsonl") if e["kind"] not in ("structure", "resume")]
    for line in lines:
        for name in ("time_s", "capture_id", "resident_bytes"):
            line.pop(name, None)
        line.get("report", {}).pop("restored_capture", None)
    return sorted(json.dumps(line, sort_keys=True) for line in lines)


def summary(folder: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    for name in ("out", "seconds", "resumed_at"):
        said.pop(name)
    for phase in said["phases"]:
        phase.pop("seconds")
    return said


def assert_same_run(whole: Path, resumed: Path) -> None:
    for name in FILES:
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    assert told(whole) == told(resumed)
    assert summary(whole) == summary(resumed)
    assert not (resumed / "snapshots").exists()
    layouts = [e for e in read_lines(resumed / "events.jsonl") if e["kind"] == "structure"]
    told_twice = len(layouts) - len({(e["step"], e["tensors"]) for e in layouts})
    assert told_twice == 0, "by the dead run, and once more"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run that nothing ended."""
    folder = tmp_path_factory.mktemp("whole")

    def run(name: str) -> Path:
        if not (folder / name).exists():
            run_task(out=folder / name, **RUNS[name])
        return folder / name

    return run


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that Ctrl-C ended; not to be changed."""
    out = tmp_path_factory.mktemp("broken") / "run"
    interrupted(out, 33, **RUNS["kept"])
    return out


@pytest.fixture
def run(broken_off: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(broken_off, tmp_path / "run")
    return tmp_path / "run"


# ------------------------------------------------------------------ it goes on as if nothing had happened

KILLED = """
import os, signal, sys
from pathlib import Path
from test_resume import RUNS, Ender
from tolaria.runs import resume_task, run_task

class Killer(Ender):
    def end(self):
        os.kill(os.getpid(), signal.SIGKILL)

out = Path(sys.argv[1])
for step in (18, 58, 99):
    child = os.fork()
    if not child:
        if out.exists():
            resume_task(out, plot=False, observers=[Killer(step)])
        else:
            run_task(out=out, observers=[Killer(step)], **RUNS["kept"])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), step
"""


def test_killed_in_each_phase(whole: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    modules = [str(Path(__file__).parent), str(Path(tolaria.__file__).parents[1])]
    subprocess.run(
        [sys.executable, "-c", KILLED, str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(modules)},
        check=True,
        timeout=300,
    )
    assert not (out / "summary.json").exists()
    assert read_lines(out / "metrics.jsonl")[-1]["step"] >= 90
    result = resume_task(out)
    assert result.resumed_at == [15, 51, 96]  # alone; incubating; blending, right before a look
    assert_same_run(whole("kept"), out)
    assert [e["step"] for e in read_lines(out / "events.jsonl") if e["kind"] == "resume"] == result.resumed_at
    assert (out / "run.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("name", "ends", "places"),
    [
        ("kept", [80, 123], [76, 120]),
        ("dropped", [57, 76, 113], [45, 72, 107]),
        ("culled", [44, 95], [40, 90]),
        ("unguarded", [61], [60]),
        ("forgetful", [50], [45]),
        ("drawing", [22, 33], [20, 30]),
    ],
)
def test_ended_at_many_steps(
    name: str, ends: list[int], places: list[int], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for i, step in enumerate(ends):
        if i == 0:
            result = interrupted(out, step, **RUNS[name])
        else:
            result = resume_task(out, plot=False, task=spec(name), observers=[Ender(step)])
        assert result.interrupted
        assert result.steps == step
    result = resume_task(out, plot=False, task=spec(name))
    assert result.resumed_at == places
    assert_same_run(whole(name), out)


def test_result_tells_the_whole_story(whole: Callable[[str], Path], run: Path) -> None:
    result = resume_task(run, plot=False)
    lines = read_lines(whole("kept") / "metrics.jsonl")
    assert [v.step for v in result.validations] == [x["step"] for x in lines if x["kind"] == "validation"]
    assert [p.phase for p in result.phases] == ["host", "incubate", "blend", "finish"]
    assert result.host_test is not None
    assert result.rollbacks == 2


def test_random_streams_of_the_caller_are_left_as_found(run: Path) -> None:
    before = torch.get_rng_state()
    resume_task(run, plot=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_damaged_state_gives_way_to_the_one_before(whole: Callable[[str], Path], run: Path) -> None:
    older, newest = sorted((run / "snapshots").glob("step_*"))
    tensors = newest / "__0_0.distcp"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match="is read instead"):
        result = resume_task(run, plot=False)
    assert result.resumed_at == [int(older.name[5:])]
    assert_same_run(whole("kept"), run)


def test_lines_that_were_lost_are_a_gap_and_a_warning(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:10]) + lines[10][:20])
    with pytest.warns(RuntimeWarning, match=r"it lacks \d+ of the first \d+ steps"):
        result = resume_task(run, plot=False)
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl") if line["kind"] == "step"]
    assert steps == [*range(1, 11), *range(result.resumed_at[0] + 1, 151)]


# ------------------------------------------------------------------ what cannot be resumed


def damage(run: Path) -> None:
    for path in (run / "snapshots").glob("*/document.json"):
        path.write_text("{")


def diverge(run: Path) -> None:
    said = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**said, "diverged": "25 rollbacks"}))


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        said = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**said, **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            lambda run: (run / "config.json").unlink(),
            ValueError,
            "expected the folder of a run, with config.json",
        ),
        (lambda run: (run / "config.json").write_text("{"), ValueError, "config.json: expected JSON"),
        (
            lambda run: shutil.rmtree(run / "snapshots"),
            SnapshotError,
            "expected a state to go on from in snap",
        ),
        (damage, SnapshotError, "expected a whole snapshot in it, found none.*document.json"),
        (diverge, ValueError, "which diverged and would again: 25 rollbacks"),
        (change_config(settings={"lr": -1}), ValueError, "config.json: expected settings .* lr: expected"),
        (change_config(faults=["Storm"]), ValueError, "config.json: expected settings .* inject: expected"),
        (change_config(task="nothing"), ValueError, "task: expected one of"),
        (change_config(task="text"), ValueError, "slot: expected one of attention0"),
        (change_config(governor=None), SnapshotError, "one has a governor, the other none"),
    ],
)
def test_what_does_not_fit_is_one_error_and_changes_nothing(
    change: Callable[[Path], object], error: type[Exception], sentence: str, run: Path
) -> None:
    if sentence == "expected a state to go on from in snap":  # a summary would say that it is over
        (run / "summary.json").unlink()
    change(run)
    before = content(run)
    with pytest.raises(error, match=sentence):
        resume_task(run, plot=False)
    assert content(run) == before


def test_a_run_that_is_over_says_so(whole: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = whole("culled")
    before = content(folder)
    assert main(["train", "--resume", str(folder)]) == 2
    assert "which is over: all its 150 steps are taken" in capsys.readouterr().err
    assert content(folder) == before


def test_a_run_that_goes_on_is_left_alone(run: Path) -> None:
    lock = FolderLock(run)
    lock.acquire()
    try:
        with pytest.raises(FolderInUseError, match=r"resume: .*which process \d+ on .* is writing to"):
            resume_task(run)
    finally:
        lock.release()


def test_a_new_run_removes_the_states_of_the_former(run: Path) -> None:
    mine = run / "snapshots" / "mine.txt"
    mine.touch()
    interrupted(run, 1, overwrite=True, **RUNS["culled"])
    assert {path.name for path in (run / "snapshots").glob("step_*")} == {"step_000000000"}
    assert mine.exists()
    with pytest.raises(ValueError, match="holds files"):
        RunFolder(run, plot=False)


# ------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    "option",
    [["digits"], ["--lr", "1e-2"], ["--rng-seed", "0"], ["--epochs", "9"], ["--device", "cpu"], ["--no-grow"],
     ["--out", "x"], ["--overwrite"], ["--inject", "spike@9"], ["--strict"], ["--steps", "0"],
     ["--preset", "default"]],
)  # fmt: skip
def test_options_of_the_run_are_refused(
    option: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(run)
    assert main(["train", *option, "--resume", str(run)]) == 2
    name = {"digits": "TASK", "--strict": "--preset"}.get(option[0], option[0])
    assert f"tolaria train: {name}: expected not to come with --resume" in capsys.readouterr().err
    assert content(run) == before


def test_the_command_goes_on_and_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(run)]) == 0
    said = capsys.readouterr().out
    (at,) = json.loads((run / "summary.json").read_text())["resumed_at"]
    assert f"resumed at step {at}: " in said
    assert f", resumed after step {at}\n" in said
    counted = {
        kind: sum(e["kind"] == kind for e in read_lines(run / "events.jsonl"))
        for kind in ("capture", "rollback")
    }
    assert f"{counted['capture']} captures, " in said
    assert f", {counted['rollback']} rollbacks, " in said
    assert (run / "run.png").stat().st_size > 20_000

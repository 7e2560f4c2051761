"""The run folder: whatever a run said, in files that other programs can read."""

from __future__ import annotations

import json
import math
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch

import tolaria
from tolaria._optional import require
from tolaria.governor import PromotionEvent
from tolaria.ops import StateField
from tolaria.runs.files import LOCK, FolderLock, write_whole
from tolaria.runs.past import CONFIG, EVENTS, METRICS, SNAPSHOTS, SUMMARY, Past, read_config
from tolaria.runs.plot import plot_run
from tolaria.runs.resources import memory_in_use
from tolaria.runs.storage import MODEL_FILES, save_model
from tolaria.snapshot import persist
from tolaria.telemetry.verdict import judged_norm
from tolaria.train.faults import Fault
from tolaria.train.observers import (
    GrowthObserver,
    PhaseRecord,
    SeedRecord,
    StepRecord,
    StoryContext,
    ValidationRecord,
)

if TYPE_CHECKING:
    from tolaria.governor import GovernorEvent, TolariaGovernor
    from tolaria.train.story import GrowthResult

_FETCH_EVERY = 50  # steps between transfers of losses from the device
_RESULTS = (SUMMARY, *MODEL_FILES, "run.png", "report.html")
_FILES = (*_RESULTS, METRICS, EVENTS, CONFIG)
"""What a run leaves, in the order in which a new run removes it: without a summary it is no finished run."""


class RunFolder(GrowthObserver):
    """Writes a run into a folder while it goes on; an interrupted run leaves a complete folder, too.

    While the run lasts the folder is its own: another run that is told to write there is refused. With
    ``overwrite`` the former run's files are removed before the first of the new one is written.

    ``config.json`` (before the first step), ``metrics.jsonl`` (a line per step, validation and phase),
    ``events.jsonl`` (what the governor said, what happened to the seed, what was broken on purpose),
    ``model.safetensors`` and ``model.json`` (see :func:`tolaria.runs.load_model`), ``summary.json``,
    ``run.png``. Until the run has ended as planned, also ``snapshots``: states to go on from, written at the
    start and whenever the governor has a new last known good one; without a governor, at each validation.

    Args:
        path: created with its parents; must be empty if it exists.
        overwrite: whether files of an earlier run in ``path`` may be replaced.
        plot: whether to draw ``run.png`` at the end.
        config: what ``config.json`` says beside task, settings and governor.
        faults: those that the run breaks on purpose, for ``events.jsonl``.
        resume: go on with the run in ``path``, whose other settings stay what they are.

    Raises:
        ValueError: the folder holds files already, or is a file.
        FolderInUseError: another run writes to it at this moment (also a ValueError).
        SnapshotError: there is no state to go on from, or it is damaged.
        MissingDependencyError: matplotlib or safetensors is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        plot: bool = True,
        config: Mapping[str, object] | None = None,
        faults: Sequence[Fault] = (),
        resume: bool = False,
    ) -> None:
        require("safetensors.torch", feature="a run folder", package="safetensors", extra="train")
        if plot:
            require("matplotlib", feature="run.png", package="matplotlib", extra="train")
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out: expected a folder, got the file {self.path}")
        self._lock = FolderLock(self.path, "resume" if resume else "out")
        self._lock.check()
        self._overwrite = overwrite
        if not overwrite and not resume:
            self._check_empty()
        self.past = self._take_over() if resume else None
        """What the run has left before, if it is resumed."""
        self._plot, self._config, self._faults = plot, dict(config or {}), list(faults)
        self._pending: list[tuple[StepRecord, tuple[torch.Tensor, ...]]] = []
        self._metrics: IO[str] | None = None
        self._events: IO[str] | None = None
        self._governor: TolariaGovernor | None = None
        self._save: Callable[[Path], Future[Path]] | None = None
        self._saving: Future[Path] | None = None
        self.summary: dict[str, Any] = {}
        """What ``summary.json`` says, once the run is over."""

    def on_start(self, context: StoryContext) -> None:
        """Create the folder and its files, or go on with those of the run that is resumed."""
        try:
            self._open()
        except OSError as error:
            raise ValueError(
                f"out: expected a folder that can be written, got {self.path}: {error}"
            ) from error
        self._governor, self._save = context.governor, context.save
        if self.past is None:
            self._write_config(context)
            self._save_state()
        elif self._governor is None:  # else the governor tells it
            self._event({"kind": "resume", "step": context.first_step})

    def _open(self) -> None:
        """Claim the folder, remove what is to be written anew, open the record."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        if self.past is not None:
            self.past.cut_record()
        elif not self._overwrite:
            self._check_empty()  # once more: now nobody else can change it
        else:
            persist.clear(self.path / SNAPSHOTS)
        for name in _FILES if self.past is None else _RESULTS:
            (self.path / name).unlink(missing_ok=True)
        self._metrics = (self.path / METRICS).open("a", encoding="utf-8")
        self._events = (self.path / EVENTS).open("a", encoding="utf-8")

    def _take_over(self) -> Past:
        """Claim the folder of a run, and look at what it has left."""
        read_config(self.path)  # before anything is written to what may be no run
        try:
            self._lock.acquire()
        except OSError as error:
            raise ValueError(
                f"resume: expected a folder that can be written, got {self.path}: {error}"
            ) from error
        try:
            return Past(self.path)
        except BaseException:
            self._lock.release()
            raise

    def _write_config(self, context: StoryContext) -> None:
        governor = context.governor
        config = {
            "task": context.task.name,
            "slot": context.slot,
            "total_steps": context.total_steps,
            "settings": asdict(context.settings),
            "governor": None if governor is None else asdict(governor.config),
            "random_guess_loss": context.task.guess_loss,
            "faults": [getattr(fault, "name", type(fault).__name__) for fault in self._faults],
            "versions": {
                "tolaria": tolaria.__version__, "torch": torch.__version__,
                "python": platform.python_version(),
            },
            **self._config,
        }  # fmt: skip
        self._write_json(CONFIG, config)

    def on_step(self, record: StepRecord) -> None:
        """Keep the step; every now and then fetch the losses of many in one transfer."""
        self._pending.append((record, (record.loss, record.alpha.clone(), *self._judged_norm())))
        for fault in self._faults:
            if fault.strikes(record.step) and not fault.strikes(record.step - 1):
                name = getattr(fault, "name", type(fault).__name__)
                self._event({"kind": "fault", "step": record.step, "name": name})
        if len(self._pending) >= _FETCH_EVERY:
            self._flush()

    def _judged_norm(self) -> tuple[torch.Tensor, ...]:
        """The gradient's norm that the governor judged in this step, on the device, if it judges norms."""
        if self._governor is None or not self._governor.config.gradient_norm:
            return ()
        verdict = self._governor.last_verdict
        return () if verdict is None else (verdict.fields[StateField.gradient_norm],)

    def on_events(self, events: Sequence[GovernorEvent]) -> None:
        """Write what the governor said."""
        for event in events:
            self._event(event.as_dict())
        if any(isinstance(event, PromotionEvent) for event in events):
            self._save_state()

    def on_seed(self, record: SeedRecord) -> None:
        """Write what happened to the seed."""
        self._event({"kind": "seed", **asdict(record), "stage": record.stage.name})

    def on_validation(self, record: ValidationRecord) -> None:
        """Write the figures."""
        self._flush()
        figures = record.metrics._asdict()
        self._line({"kind": "validation", "step": record.step, "phase": record.phase, **figures})
        self._event({"kind": "resources", "step": record.step, "time_s": time.time(), **memory_in_use()})
        if self._governor is None:
            self._save_state()

    def on_phase_end(self, record: PhaseRecord) -> None:
        """Write which steps the phase took."""
        self._flush()
        steps = {"start_step": record.start_step, "end_step": record.end_step}
        self._line({"kind": "phase", "phase": record.phase, **steps})  # seconds would differ from run to run

    def on_finish(self, result: GrowthResult) -> None:
        """Close the files, save the model, draw the picture."""
        self._flush()
        self._close_files()
        self._end_saving()
        self.summary = {"out": str(self.path), **summarize(result)}
        self._write_json(SUMMARY, self.summary)
        save_model(result.model, self.path, task=result.task)
        if self._plot:
            plot_run(self.path)
        if not result.interrupted and result.error is None:
            persist.clear(self.path / SNAPSHOTS)
        self.close()

    def _save_state(self) -> None:
        """Have a state written to go on from, after its record; none while another is being written."""
        assert self._save is not None, "on_start comes first"
        if self._saving is not None and not self._saving.done():
            return
        self._end_saving()
        self._flush()
        self._saving = self._save(self.path / SNAPSHOTS)

    def _end_saving(self) -> None:
        """Wait for a state that is being written, and say so if that failed."""
        saving, self._saving = self._saving, None
        error = None if saving is None else saving.exception()
        if error is not None:
            warnings.warn(
                f"{self.path / SNAPSHOTS}: a state to go on from could not be written: {error}",
                RuntimeWarning,
                stacklevel=2,
            )

    def close(self) -> None:
        """Let others write to the folder; called at the end of :meth:`on_finish`, too."""
        self._close_files()
        self._lock.release()

    def _close_files(self) -> None:
        for file in (self._metrics, self._events):
            if file is not None:
                file.close()

    def _check_empty(self) -> None:
        if self.path.is_dir() and any(entry.name != LOCK for entry in self.path.iterdir()):
            raise ValueError(
                f"out: expected an empty or new folder, {self.path} holds files; name another one"
            )

    def _flush(self) -> None:
        if not self._pending:
            return
        held = [torch.stack([each.double() for each in tensors]) for _, tensors in self._pending]
        for (record, _), (loss, alpha, *norm) in zip(self._pending, _fetched(held), strict=True):
            values: dict[str, object] = {
                "kind": "step", "step": record.step, "phase": record.phase, "stage": record.stage.name,
                "loss": loss, "alpha": alpha, "lr": record.lr,
            }  # fmt: skip
            if norm:
                values["gradient_norm"] = judged_norm(norm[0])
            self._line(values)
        self._pending.clear()
        if self._metrics is not None:
            self._metrics.flush()

    def _line(self, values: Mapping[str, object]) -> None:
        assert self._metrics is not None, "on_start comes first"
        self._metrics.write(_dump(values) + "\n")

    def _event(self, values: Mapping[str, object]) -> None:
        assert self._events is not None, "on_start comes first"
        self._events.write(_dump(values) + "\n")
        self._events.flush()

    def _write_json(self, name: str, values: Mapping[str, object]) -> None:
        write_whole(self.path / name, (_dump(values, indent=2) + "\n").encode())


def _fetched(held: Sequence[torch.Tensor]) -> list[list[float]]:
    """Rows of values in one transfer; a governor's first steps may lack the norm that later ones have."""
    if len({len(row) for row in held}) == 1:
        return cast("list[list[float]]", torch.stack(list(held)).tolist())
    return [row.tolist() for row in held]


def summarize(result: GrowthResult) -> dict[str, Any]:
    """What became of a run, as JSON values."""
    seeds = {id(p) for p in result.model.seed_parameters()}
    parameters = {id(p): p.numel() for p in result.model.parameters()}
    return {
        "task": result.task,
        "outcome": result.outcome,
        "steps": result.steps,
        "seconds": round(result.seconds, 2),
        "interrupted": result.interrupted,
        "resumed_at": list(result.resumed_at),
        "diverged": None if result.error is None else str(result.error),
        "rollbacks": result.rollbacks,
        "host_parameters": sum(n for key, n in parameters.items() if key not in seeds),
        "seed_parameters": sum(n for key, n in parameters.items() if key in seeds),
        "host_test": None if result.host_test is None else result.host_test._asdict(),
        "host_test_step": None if result.host_test is None else result.phases[0].end_step,
        "host_test_note": "at an earlier step of this run, before a seed; no control that took all the steps",
        "test": None if result.test is None else result.test._asdict(),
        "control_test": None if result.control_test is None else result.control_test._asdict(),
        "control_test_note": "the host alone for the same steps, from where the seed began to be blended in",
        "phases": [asdict(phase) for phase in result.phases],
        "seed": [{**asdict(seed), "stage": seed.stage.name} for seed in result.seeds],
    }


def _dump(value: object, indent: int | None = None) -> str:
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: object) -> object:
    """JSON has no NaN: non-finite numbers become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)

"""Goes on with a run that was interrupted: what ``tolaria train --resume`` does, as a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tolaria._backend import Mode
from tolaria._backend import backend as use_backend
from tolaria.governor import GovernorConfig
from tolaria.nn.device import validate_device
from tolaria.runs.folder import RunFolder
from tolaria.runs.past import CONFIG, read_config
from tolaria.runs.record import Line
from tolaria.runs.run import DTYPES, cpu_threads
from tolaria.tasks.spec import TaskSpec, TrainSettings, get_task
from tolaria.train.faults import InjectedFault, parse_fault
from tolaria.train.observers import GrowthObserver
from tolaria.train.story import GrowthResult, grow

if TYPE_CHECKING:
    from tolaria.governor import GovernorEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recorded:
    """The arguments of a run, as ``config.json`` holds them."""

    task: TaskSpec
    settings: TrainSettings
    governor: GovernorConfig | None
    faults: list[InjectedFault]
    device: torch.device
    rng_seed: int
    backend: Mode
    threads: int
    amp_dtype: torch.dtype | None
    data_dir: Path | None

    @classmethod
    def of(cls, config: Line, task: TaskSpec | None) -> _Recorded:
        """Read them; a task that is not given is looked up by its name."""
        governor, data_dir, amp = config["governor"], config["data_dir"], config["amp"]
        return cls(
            task=task if task is not None else get_task(config["task"]),
            settings=TrainSettings(**config["settings"]),
            governor=None if governor is None else _governor_config(governor),
            faults=[parse_fault(name) for name in config["faults"]],
            device=validate_device(config["device"]),
            rng_seed=config["rng_seed"],
            backend=config["backend"],
            threads=config["threads"],
            amp_dtype=None if amp is None else DTYPES[amp],
            data_dir=None if data_dir is None else Path(data_dir),
        )


def _governor_config(settings: Line) -> GovernorConfig:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return GovernorConfig(**values)


def resume_task(
    folder: str | Path,
    *,
    task: TaskSpec | None = None,
    plot: bool = True,
    observers: Sequence[GrowthObserver] = (),
    sinks: Sequence[Callable[[GovernorEvent], object]] = (),
) -> GrowthResult:
    """Go on with the run in ``folder``, which Ctrl-C, a crash or ``kill -9`` ended.

    All settings are those of the run; the learning rate depends on how many steps there are in all, so that
    these cannot be changed either. It goes on from the newest whole state in ``snapshots``, and ends, on the
    same machine, with the same bytes as if nothing had interrupted it. What was recorded after that state is
    dropped, and recorded anew.

    Args:
        folder: of :func:`run_task`.
        task: the one of then; looked up by its name if None.
        plot: whether to draw ``run.png``.
        observers: as for :func:`run_task`.
        sinks: likewise.

    Returns:
        The network and its whole story, ``resumed_at`` the steps after which it was resumed.

    Raises:
        ValueError: ``folder`` is no run, the run is over or has diverged, its settings are not those of this
            version, or it was broken on purpose by a fault without a name. FolderInUseError, which is one:
            the run is still going on.
        SnapshotError: there is no state to go on from, all are damaged, or the task is another now. Whatever
            is raised before the first step, the folder is as it was.
        RuntimeError: the device is not there.
        TrainingDivergedError, KeyboardInterrupt, MissingDependencyError: as :func:`run_task`.
    """
    path = Path(folder)
    config = read_config(path)
    try:
        said = _Recorded.of(config, task)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"resume: {path / CONFIG}: expected settings that can be used here: {error}"
        ) from error
    with use_backend(said.backend), cpu_threads(said.threads):
        run = RunFolder(path, plot=plot, faults=said.faults, resume=True)
        with closing(run):
            assert run.past is not None, "it was asked to resume"
            data = said.task.load_data(
                batch_size=said.settings.batch_size, rng_seed=said.rng_seed, data_dir=said.data_dir
            )
            return grow(
                said.task, device=said.device, rng_seed=said.rng_seed, settings=said.settings, data=data,
                use_governor=said.governor is not None, governor_config=said.governor, sinks=sinks,
                observers=[run, *observers], faults=said.faults, amp_dtype=said.amp_dtype,
                resumption=run.past.resumption,
            )  # fmt: skip

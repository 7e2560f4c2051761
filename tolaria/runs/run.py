"""One call for a whole run: what ``tolaria train`` does, as a function."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from tolaria._backend import Mode, current_mode
from tolaria._backend import backend as use_backend
from tolaria.governor.config import Preset
from tolaria.nn.device import validate_device
from tolaria.runs.folder import RunFolder
from tolaria.tasks.data import TaskData
from tolaria.tasks.spec import TaskSpec, TrainSettings, get_task
from tolaria.train.faults import Fault, InjectedFault, parse_fault
from tolaria.train.observers import GrowthObserver
from tolaria.train.story import GrowthResult, governor_config_for, grow

if TYPE_CHECKING:
    from tolaria.governor import GovernorEvent

Precision = Literal["float16", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""What ``amp`` may be."""
_OF_SEEDS = (
    "seed_lr", "seed_max_grad_norm", "slot", "blueprint", "blueprint_options", "alpha_kind", "min_gain",
    "max_germinations",
)  # fmt: skip
_PARTS = ("host_steps", "incubate_steps", "blend_steps", "finish_steps")


def run_task(
    task: str | TaskSpec = "digits",
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    plot: bool = True,
    device: str | torch.device = "cpu",
    rng_seed: int = 0,
    backend: Mode | None = None,
    threads: int | None = None,
    amp: Precision | None = None,
    data_dir: str | Path | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    grow_seed: bool = True,
    use_governor: bool = True,
    preset: Preset = "default",
    governor_options: Mapping[str, object] | None = None,
    inject: Sequence[str | Fault] = (),
    observers: Sequence[GrowthObserver] = (),
    sinks: Sequence[Callable[[GovernorEvent], object]] = (),
    **settings: object,
) -> GrowthResult:
    """Train ``task`` from the host alone to the grown network, and leave a run folder.

    Args:
        task: a registered name or a TaskSpec.
        out: the run folder; ``runs/<task>-<time>-<process>`` if None, see :class:`RunFolder`.
        overwrite: whether ``out`` may hold the files of an earlier run.
        plot: whether to draw ``run.png``.
        device: where to train.
        rng_seed: seeds model, data order and seed.
        backend: ``"auto"``, ``"fused"`` or ``"reference"`` while the run lasts; the mode in force if None.
        threads: CPU threads of torch while the run lasts; as they are if None.
        amp: train under autocast with this dtype.
        data_dir: where a task that needs files finds them; an error for one that needs none.
        steps: optimizer steps in all; the phases keep their shares.
        epochs: passes over the training data in all, instead of ``steps``.
        grow_seed: False leaves the host alone for all the steps.
        use_governor: whether a governor watches over the run.
        preset: the governor's settings, see :meth:`GovernorConfig.preset`.
        governor_options: fields of :class:`GovernorConfig` that are to differ.
        inject: faults, such as ``"nan-loss@300"``; see :func:`tolaria.train.parse_fault`.
        observers: told what happens, beside the folder.
        sinks: called with each of the governor's events.
        **settings: fields of :class:`TrainSettings` to change, ``lr=1e-3`` for example.

    Returns:
        The network and its story; on Ctrl-C the story so far.

    Raises:
        ValueError: a bad argument; nothing has been written then. FolderInUseError, which is one: another
            run writes to ``out`` at this moment.
        RuntimeError: the device is not there.
        MissingDependencyError: a package of the extra ``train`` is not installed.
        TrainingDivergedError: rollbacks came too often; the folder is complete.
        KeyboardInterrupt: Ctrl-C came before the first step, or when training was over: the folder is then
            complete.
    """
    spec = task if isinstance(task, TaskSpec) else get_task(task)
    where = validate_device(device)
    if amp is not None and amp not in DTYPES:
        raise ValueError(f"amp: expected one of {', '.join(DTYPES)} or None, got {amp!r}")
    faults = [parse_fault(fault) if isinstance(fault, str) else fault for fault in inject]
    spec.check_data_dir(data_dir)
    _check_in_use(settings, grow_seed=grow_seed)
    if not use_governor:
        _check_unguarded(preset=preset != "default", governor_options=governor_options, sinks=sinks)
    config = governor_config_for(spec, preset=preset, **dict(governor_options or {}))
    chosen = spec.defaults.replace(**settings)
    if isinstance(rng_seed, bool) or not isinstance(rng_seed, int) or not 0 <= rng_seed < 2**31:
        raise ValueError(f"rng_seed: expected an integer from 0 to {2**31 - 1}, got {rng_seed!r}")
    data = spec.load_data(
        batch_size=chosen.batch_size, rng_seed=rng_seed, data_dir=None if data_dir is None else Path(data_dir)
    )
    chosen = _with_length(chosen, data, steps, epochs, grow_seed=grow_seed, given=settings)
    named = [fault for fault in faults if isinstance(fault, InjectedFault)]
    late = [f"step {fault.step}" for fault in named if fault.step > chosen.total_steps]
    if late:
        raise ValueError(
            f"inject: expected steps up to {chosen.total_steps}, the last of this run, got {', '.join(late)}"
        )
    with use_backend(backend) if backend is not None else nullcontext(), cpu_threads(threads):
        folder = RunFolder(
            out if out is not None else default_folder(spec.name),
            overwrite=overwrite,
            plot=plot,
            faults=faults,
            config={
                "device": str(where),
                "rng_seed": rng_seed,
                "backend": current_mode(),
                "amp": amp,
                "threads": torch.get_num_threads(),
                "data_dir": None if data_dir is None else str(Path(data_dir).absolute()),
            },
        )
        with closing(folder):
            return grow(
                spec, device=where, rng_seed=rng_seed, settings=chosen, data=data, use_governor=use_governor,
                governor_config=config, sinks=sinks, observers=[folder, *observers], faults=faults,
                amp_dtype=None if amp is None else DTYPES[amp],
            )  # fmt: skip


def _check_in_use(settings: Mapping[str, object], *, grow_seed: bool) -> None:
    """Refuse what a run without a seed would ignore."""
    useless = [name for name in _OF_SEEDS if name in settings and not grow_seed]
    if useless:
        raise ValueError(
            f"{useless[0]}: expected not to come with grow_seed=False (--no-grow), which grafts no seed"
        )


def _check_unguarded(**given: object) -> None:
    """Refuse what a run without a governor would ignore."""
    for name, value in given.items():
        if value:
            names = ", ".join(value) if isinstance(value, Mapping) else name
            raise ValueError(
                f"{names}: expected not to come with use_governor=False (--no-governor): nobody judges"
            )


def default_folder(task: str) -> Path:
    """``runs/<task>-<time>-<process>``, with a number behind it where that exists already."""
    base = Path("runs") / f"{task.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    chosen, number = base, 1
    while chosen.exists():
        number += 1
        chosen = base.with_name(f"{base.name}-{number}")
    return chosen


def _with_length(
    settings: TrainSettings,
    data: TaskData,
    steps: int | None,
    epochs: float | None,
    *,
    grow_seed: bool,
    given: Mapping[str, object],
) -> TrainSettings:
    """The settings stretched to ``steps`` or ``epochs`` in all."""
    if steps is not None and epochs is not None:
        raise ValueError(f"steps, epochs: expected one of them, got steps={steps} and epochs={epochs}")
    if epochs is not None:
        if not 0 < epochs < float("inf"):
            raise ValueError(f"epochs: expected a number above 0, got {epochs!r}")
        steps = max(1, round(epochs * len(data.train) / settings.accumulation_steps))
    if steps is not None:
        stretched = _stretched(settings, steps)
        asked = {
            name: getattr(settings, name) for name in ("warmup_steps", "validate_every") if name in given
        }
        settings = replace(stretched, **asked)
    return settings if grow_seed else replace(settings, max_germinations=0)


def _stretched(settings: TrainSettings, steps: int) -> TrainSettings:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected an integer >= 1, got {steps!r}")
    share = steps / settings.total_steps
    parts = {name: int(getattr(settings, name) * share) for name in _PARTS}
    parts["blend_steps"] = max(1, parts["blend_steps"])
    parts["finish_steps"] = 0
    parts["finish_steps"] = steps - sum(parts.values())
    if parts["finish_steps"] < 0:  # so few that the ramp alone is too long
        parts = {"host_steps": 0, "incubate_steps": 0, "blend_steps": steps, "finish_steps": 0}
    parts["trial_steps"] = round(settings.trial_steps * share)
    warmup = min(settings.warmup_steps, steps // 4)
    every = max(1, min(settings.validate_every, round(settings.validate_every * share) or 1, steps))
    if steps >= settings.total_steps:
        every = settings.validate_every
    return replace(settings, warmup_steps=warmup, validate_every=max(every, min(20, steps)), **parts)  # type: ignore[arg-type]


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """``count`` CPU threads of torch inside; as many as there are if None.

    Raises:
        ValueError: below 1, or more than four for each core.
    """
    if count is None:
        yield
        return
    most = 4 * (os.cpu_count() or 1)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
        raise ValueError(f"threads: expected an integer from 1 to {most}, got {count!r}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

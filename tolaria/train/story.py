"""The whole story of a growing network: host alone, germinate, incubate, blend, fossilise or cull, finish."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tolaria.nn.device import validate_device
from tolaria.nn.model import MorphogeneticModel
from tolaria.nn.randomness import preserve_random_state
from tolaria.tasks.data import TaskData
from tolaria.tasks.spec import TaskSpec, TrainSettings, create_model, get_task
from tolaria.train.bookmark import Bookmarker, Resumption
from tolaria.train.faults import Fault, InjectedFault
from tolaria.train.narrator import Narrator
from tolaria.train.observers import GrowthObserver, GrowthResult
from tolaria.train.trained import governor_config_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from tolaria.governor import GovernorConfig, GovernorEvent

__all__ = ["GrowthResult", "governor_config_for", "grow"]


def grow(
    task: str | TaskSpec,
    *,
    device: str | torch.device = "cpu",
    rng_seed: int = 0,
    settings: TrainSettings | None = None,
    model: MorphogeneticModel | None = None,
    data: TaskData | None = None,
    data_dir: Path | None = None,
    use_governor: bool = True,
    governor_config: GovernorConfig | None = None,
    sinks: Sequence[Callable[[GovernorEvent], object]] = (),
    observers: Sequence[GrowthObserver] = (),
    faults: Sequence[Fault] = (),
    amp_dtype: torch.dtype | None = None,
    resumption: Resumption | None = None,
    **changes: object,
) -> GrowthResult:
    """Train a host, graft a seed, let it learn, blend it in, and keep it if it earns its place.

    Args:
        task: a registered name or a TaskSpec.
        device: where to train.
        rng_seed: seeds the model, the order of the data and the seed; the global random streams are left as
            found.
        settings: how to train; the task's defaults if None.
        model: the network to grow; a new one if None.
        data: what to train on; the task's own if None.
        data_dir: where a task that needs files finds them; an error for one that needs none.
        use_governor: whether a governor watches over the run.
        governor_config: its settings; its defaults if None.
        sinks: called with each of its events.
        observers: told what happens; see :class:`GrowthObserver`.
        faults: things to break on purpose; see :func:`tolaria.train.faults.parse_fault`.
        amp_dtype: train under autocast with this dtype (float16 on CUDA with a GradScaler).
        resumption: a state to go on from that an observer had saved by :attr:`StoryContext.save`; all other
            arguments are to be those of then. See :func:`tolaria.runs.resume_task`.
        **changes: fields of :class:`TrainSettings` to change: ``lr=1e-3``, ``blueprint="depthwise"``.

    Returns:
        The network and its story; on Ctrl-C the story so far, ``interrupted``.

    Raises:
        ValueError: a bad argument (unknown task, slot, blueprint or setting).
        RuntimeError: the device is not there.
        SnapshotError: what is to be resumed does not fit the other arguments.
        TrainingDivergedError: rollbacks came too often; observers have been given the result before it is
            raised.
        KeyboardInterrupt: Ctrl-C came when training was over; here, too, observers have the result already.
    """
    spec = task if isinstance(task, TaskSpec) else get_task(task)
    chosen = (settings if settings is not None else spec.defaults).replace(**changes)
    where = validate_device(device)
    spec.check_data_dir(data_dir)
    with preserve_random_state():
        torch.manual_seed(rng_seed)
        network = model.to(where) if model is not None else create_model(spec, where)
        slot = chosen.slot if chosen.slot is not None else list(network.slots)[-1]
        _rehearse(network, slot, chosen, faults)
        material = data if data is not None else spec.load_data(
            batch_size=chosen.batch_size, rng_seed=rng_seed, data_dir=data_dir
        )  # fmt: skip
        story = Narrator(spec, chosen, network, slot, material, where, rng_seed, observers, faults, amp_dtype)
        if resumption is not None:
            story.go_to(resumption)
        if use_governor:
            story.trained.attach_governor(spec, governor_config, sinks, Bookmarker(story.bookmark))
        if resumption is not None:
            story.trained.go_on(resumption.state)
        return story.tell()


def _rehearse(model: MorphogeneticModel, slot: str, settings: TrainSettings, faults: Sequence[Fault]) -> None:
    """Germinate and break a copy: what does not fit is to fail now, not after the host was trained."""
    model.slot(slot)
    if settings.max_germinations:
        copy.deepcopy(model).germinate(slot, settings.blueprint, options=settings.blueprint_options)
    broken = copy.deepcopy(model)
    for fault in faults:
        if isinstance(fault, InjectedFault):
            fault.before_forward(broken)

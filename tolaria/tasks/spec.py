"""What a task is, and the registry of tasks."""

from __future__ import annotations

import difflib
import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from torch import nn

from tolaria.errors import ConfigError
from tolaria.nn.device import validate_device
from tolaria.nn.model import MorphogeneticModel
from tolaria.nn.nest import Inputs
from tolaria.nn.randomness import check_rng_seed, preserve_random_state
from tolaria.nn.schedule import MOST_STEPS, ScheduleKind
from tolaria.tasks.data import TaskData

TaskType = Literal["classification", "lm"]


class LoadData(Protocol):
    """Loads a task's data."""

    def __call__(self, *, batch_size: int, rng_seed: int, data_dir: Path | None) -> TaskData:
        """Batches of ``batch_size``, the training ones shuffled by ``rng_seed``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How a task is trained; each field is also an argument of :func:`tolaria.train.grow`.

    Raises:
        ConfigError: a bad field; the message lists every one.
    """

    batch_size: int = 64
    """Samples in a batch."""
    host_steps: int = 300
    """Optimizer steps of the host alone, before a seed germinates."""
    incubate_steps: int = 100
    """Steps that the seed learns in isolation."""
    blend_steps: int = 100
    """Steps over which alpha rises from 0 to 1."""
    finish_steps: int = 300
    """Steps after alpha has arrived at 1."""
    trial_steps: int = 0
    """How many of these are taken before the verdict on the seed, whose evidence comes from them; none if
    that were more than half of them (then it comes from the second half of the ramp)."""
    lr: float = 3e-3
    """Peak learning rate of the host (AdamW, cosine to nearly nothing over all the steps)."""
    seed_lr: float = 3e-3
    """Peak learning rate of a seed."""
    weight_decay: float = 1e-2
    """Of both optimizers."""
    warmup_steps: int = 20
    """Linear warm-up of the learning rate."""
    max_grad_norm: float | None = 1.0
    """Clip the host's gradient to this norm; None: do not clip."""
    seed_max_grad_norm: float | None = 1.0
    """Clip the seed's gradient to this norm, apart from the host's."""
    slot: str | None = None
    """Where the seed is grafted; the model's last slot if None."""
    blueprint: str = "conv"
    """What is grafted."""
    blueprint_options: Mapping[str, object] = field(default_factory=dict)
    """Keyword arguments for the blueprint."""
    alpha_kind: ScheduleKind = "cosine"
    """Shape of the alpha ramp."""
    validate_every: int = 100
    """Steps between looks at the validation data."""
    accumulation_steps: int = 1
    """Batches per optimizer step."""
    min_gain: float = 0.01
    """A seed is kept if the training loss is by more than this share below that of the host alone on the same
    batches, and the validation loss is not above it, both with a confidence of 95%."""
    max_germinations: int = 2
    """Seeds to try, should a rollback take one away; 0: the host stays alone."""

    def __post_init__(self) -> None:
        positive = ("batch_size", "validate_every", "accumulation_steps", "blend_steps")
        counts = dict.fromkeys(positive, 1)
        counts.update(
            dict.fromkeys(
                (
                    "host_steps",
                    "incubate_steps",
                    "finish_steps",
                    "trial_steps",
                    "warmup_steps",
                    "max_germinations",
                ),
                0,
            )
        )
        bad = [
            f"{name}: expected an integer >= {low}, got {getattr(self, name)!r}"
            for name, low in counts.items()
            if isinstance(getattr(self, name), bool)
            or not isinstance(getattr(self, name), int)
            or getattr(self, name) < low
        ]
        if isinstance(self.blend_steps, int) and self.blend_steps > MOST_STEPS:
            bad.append(f"blend_steps: expected at most {MOST_STEPS}, got {self.blend_steps}")
        for name in ("lr", "seed_lr", "max_grad_norm", "seed_max_grad_norm"):
            value = getattr(self, name)
            if not (value is None and name.endswith("norm")) and not (_is_finite(value) and value > 0):
                bad.append(f"{name}: expected a finite number above 0, got {value!r}")
        if not (_is_finite(self.weight_decay) and self.weight_decay >= 0):
            bad.append(f"weight_decay: expected a finite number >= 0, got {self.weight_decay!r}")
        if not _is_finite(self.min_gain):
            bad.append(f"min_gain: expected a finite number, got {self.min_gain!r}")
        if self.alpha_kind not in get_args(ScheduleKind):
            bad.append(f"alpha_kind: expected one of {get_args(ScheduleKind)}, got {self.alpha_kind!r}")
        if bad:
            raise ConfigError("TrainSettings: " + "; ".join(bad))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole story."""
        return self.host_steps + self.incubate_steps + self.blend_steps + self.finish_steps

    def replace(self, **changes: object) -> TrainSettings:
        """A copy with some fields changed, checked anew.

        Raises:
            ConfigError: an unknown field, or a bad value.
        """
        known = [each.name for each in fields(self)]
        for name in changes:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ConfigError(f"settings: expected one of {', '.join(known)}, got {name!r}{hint}")
        if changes.get("blueprint", self.blueprint) != self.blueprint:
            changes.setdefault("blueprint_options", {})  # the old one's mean nothing to the new one
        return replace(self, **changes)  # type: ignore[arg-type]


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """A task: what goes in, what comes out, how wrong is measured, and how it is trained by default.

    Raises:
        ConfigError: a bad field; the message lists every one.
    """

    name: str
    """What ``get_task`` and ``tolaria train`` call it."""
    summary: str = ""
    """One line for people."""
    topology: str
    """The kind of host: ``"cnn"``, ``"transformer"`` or a name of your own."""
    task_type: TaskType = "classification"
    """``"lm"``: targets per token, perplexity is reported."""
    num_classes: int
    """Classes, or symbols of the vocabulary."""
    model_factory: Callable[[], nn.Module]
    """Builds an ungrown host."""
    load_data: LoadData
    """Loads the data."""
    example_input: Callable[[], Inputs]
    """A small input of the host: a tensor, a tuple of arguments or a mapping; values do not matter."""
    slots: Sequence[str] | Mapping[str, str] | None = None
    """Injection points, as :class:`MorphogeneticModel` takes them; all that the host lists if None."""
    criterion: Callable[[], nn.Module] = nn.CrossEntropyLoss
    """Builds the loss."""
    random_guess_loss: float | None = None
    """Loss of a model that knows nothing; ln(num_classes) if None."""
    defaults: TrainSettings = field(default_factory=TrainSettings)
    """How it is trained when nobody says otherwise."""
    needs_files: bool = True
    """Whether ``load_data`` looks at ``data_dir``; if not, naming one is an error."""

    def __post_init__(self) -> None:
        bad = []
        if not isinstance(self.name, str) or not self.name:
            bad.append(f"name: expected a non-empty string, got {self.name!r}")
        if self.task_type not in get_args(TaskType):
            bad.append(f"task_type: expected one of {get_args(TaskType)}, got {self.task_type!r}")
        if not isinstance(self.num_classes, int) or self.num_classes < 2:
            bad.append(f"num_classes: expected an integer >= 2, got {self.num_classes!r}")
        for name in ("model_factory", "load_data", "example_input", "criterion"):
            if not callable(getattr(self, name)):
                bad.append(f"{name}: expected a callable, got {getattr(self, name)!r}")
        guess = self.random_guess_loss
        if guess is not None and not (math.isfinite(guess) and guess > 0):
            bad.append(f"random_guess_loss: expected a finite number > 0 or None, got {guess!r}")
        if bad:
            raise ConfigError("TaskSpec: " + "; ".join(bad))

    def check_data_dir(self, data_dir: object) -> None:
        """Raise ValueError if a ``data_dir`` is given to a task that would not look at it."""
        if data_dir is not None and not self.needs_files:
            raise ValueError(
                f"data_dir: expected None, since task {self.name!r} needs no files, got {str(data_dir)!r}"
            )

    @property
    def guess_loss(self) -> float:
        """``random_guess_loss``, or ln(num_classes) where none is given."""
        return self.random_guess_loss if self.random_guess_loss is not None else math.log(self.num_classes)


_BUILT_IN = {
    "digits": "tolaria.tasks.digits",
    "text": "tolaria.tasks.text",
    "cifar10": "tolaria.tasks.cifar10",
}
_TASKS: dict[str, TaskSpec] = {}


def register_task(spec: TaskSpec, *, replace: bool = False) -> TaskSpec:
    """Make a task known by its name, to :func:`get_task` and to ``tolaria train``.

    Args:
        spec: the task.
        replace: whether a task of that name may be replaced.

    Raises:
        TypeError: not a TaskSpec.  ValueError: the name is taken.
    """
    if not isinstance(spec, TaskSpec):
        raise TypeError(f"register_task: spec: expected a TaskSpec, got {type(spec).__name__}")
    if not replace and spec.name in list_tasks():
        raise ValueError(f"register_task: name: {spec.name!r} is taken; pass replace=True to replace it")
    _TASKS[spec.name] = spec
    return spec


def get_task(name: str) -> TaskSpec:
    """The task called ``name``; ``"module:attribute"`` names one in a module of your own.

    The attribute is a TaskSpec, or is called without arguments and returns one; the task then has this name,
    by which a run is resumed.

    Raises:
        TypeError: not a string.  ValueError: no such task; the message lists those there are, or says what is
            wrong with the module.
    """
    if not isinstance(name, str):
        raise TypeError(f"task: expected the name of a task or a TaskSpec, got {type(name).__name__}")
    if name not in _TASKS and ":" in name:
        _TASKS[name] = _imported(name)
    if name not in _TASKS:
        if name not in _BUILT_IN:
            close = difflib.get_close_matches(name, list_tasks(), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"task: expected one of {', '.join(list_tasks())}, got {name!r}{hint}")
        _TASKS[name] = importlib.import_module(_BUILT_IN[name]).make_spec()
    return _TASKS[name]


def _imported(name: str) -> TaskSpec:
    module, _, attribute = name.partition(":")
    try:
        found = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"task: expected 'module:attribute', importable from here, got {name!r} "
            f"({type(error).__name__}: {error})"
        ) from error
    spec = found if isinstance(found, TaskSpec) or not callable(found) else found()
    if not isinstance(spec, TaskSpec):
        raise ValueError(  # noqa: TRY004  (a name that was typed)
            f"task: expected {name!r} to be a TaskSpec, or to return one, got {type(spec).__name__}"
        )
    return replace(spec, name=name)


def list_tasks() -> list[str]:
    """Names of the registered tasks, sorted."""
    return sorted({*_BUILT_IN, *_TASKS})


def create_model(
    task: str | TaskSpec,
    device: str | torch.device = "cpu",
    *,
    slots: Sequence[str] | Mapping[str, str] | None = None,
    rng_seed: int | None = None,
) -> MorphogeneticModel:
    """Build a task's host with its seed slots, ungrown.

    Args:
        task: a registered name or a TaskSpec.
        device: where to put it; checked first.
        slots: which injection points get a slot; those of the task if None.
        rng_seed: seeds the initialisation and leaves the global random streams as found; None draws from
            them.

    Raises:
        TypeError: ``task`` or ``device`` is of the wrong kind, or ``rng_seed`` no integer.
        ValueError: unknown task, malformed or unsupported device, unknown slot.
        RuntimeError: the device is not there.
    """
    spec = task if isinstance(task, TaskSpec) else get_task(task)
    target = validate_device(device)
    check_rng_seed(rng_seed)
    with preserve_random_state() if rng_seed is not None else nullcontext():
        if rng_seed is not None:
            torch.default_generator.manual_seed(int(rng_seed))
        host = spec.model_factory()
    model = MorphogeneticModel(
        host, slots if slots is not None else spec.slots, example_input=spec.example_input()
    )
    return model.to(target)

"""What a slot says of its seed as JSON values, checked field by field before anything is built from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from torch import Tensor, nn

from tolaria.nn.schedule import MOST_STEPS, ScheduleKind
from tolaria.nn.seeds import describe_seed
from tolaria.nn.stage import SeedStage

_EMPTY = (SeedStage.DORMANT, SeedStage.CULLED)
_FIELDS = ("stage", "blueprint", "options", "rng_seed", "generation", "schedule")
_SCHEDULE_FIELDS = ("kind", "steps", "start", "end", "position")
_MOST_GENERATIONS = 2**31 - 1


def check_structure(slot: str, structure: object) -> SeedStage:
    """Check what :meth:`SeedSlot.structure` returned, wherever it has been since.

    Args:
        slot: how errors name the slot.
        structure: the description; exactly its six fields.

    Returns:
        The stage.

    Raises:
        ValueError: a field is missing, unknown, of the wrong type or out of range.
    """
    where = f"slot {slot!r}: structure"
    values = _fields(where, structure, _FIELDS)
    stages = [each.value for each in SeedStage]
    if not isinstance(values["stage"], str) or values["stage"] not in stages:
        raise ValueError(f"{where}: stage: expected one of {', '.join(stages)}, got {values['stage']!r}")
    stage = SeedStage(values["stage"])
    check_whole_number(f"{where}: generation", values["generation"], 0, _MOST_GENERATIONS)
    if not isinstance(values["options"], Mapping) or not all(isinstance(k, str) for k in values["options"]):
        raise ValueError(f"{where}: options: expected a mapping from names, got {values['options']!r}")
    blueprint, rng_seed = values["blueprint"], values["rng_seed"]
    if stage in _EMPTY:
        if blueprint is not None or rng_seed is not None or values["options"]:
            raise ValueError(f"{where}: expected no seed in stage {stage.name}, got blueprint {blueprint!r}")
    else:
        if blueprint is None:
            raise ValueError(
                f"{where}: blueprint: its seed was built by a callable; register a blueprint for it"
            )
        if not isinstance(blueprint, str):
            raise ValueError(f"{where}: blueprint: expected the name of a blueprint, got {blueprint!r}")
        check_whole_number(f"{where}: rng_seed", rng_seed, -(2**63), 2**63 - 1)
    if (values["schedule"] is not None) != (stage is SeedStage.BLENDING):
        expected = "a schedule" if stage is SeedStage.BLENDING else "None"
        raise ValueError(
            f"{where}: schedule: expected {expected} in stage {stage.name}, got {values['schedule']!r}"
        )
    if stage is SeedStage.BLENDING:
        _check_schedule(f"{where}: schedule", values["schedule"])
    return stage


def seed_numel(slot: str, structure: Mapping[str, Any], features: Tensor) -> int:
    """Elements of the seed that a checked ``structure`` with a blueprint describes; nothing is allocated.

    Raises:
        ValueError, TypeError: the blueprint is unknown, or cannot be built with these options.
    """
    seed = describe_seed(structure["blueprint"], features, structure["options"], where=f"slot {slot!r}")
    return count_elements(seed)


def count_elements(module: nn.Module) -> int:
    """Elements of a module's state, tied tensors once."""
    state = module.state_dict(keep_vars=True).values()
    return sum({id(value): value.numel() for value in state if isinstance(value, Tensor)}.values())


def check_whole_number(where: str, value: object, low: int, high: int) -> None:
    """Raise ValueError unless ``value`` is an integer (no bool) from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{where}: expected an integer from {low} to {high}, got {_short(value)}")


def _check_schedule(where: str, schedule: object) -> None:
    values = _fields(where, schedule, _SCHEDULE_FIELDS)
    if values["kind"] not in get_args(ScheduleKind):
        raise ValueError(
            f"{where}: kind: expected one of {get_args(ScheduleKind)}, got {_short(values['kind'])}"
        )
    check_whole_number(f"{where}: steps", values["steps"], 1, MOST_STEPS)
    check_whole_number(f"{where}: position", values["position"], 0, values["steps"])
    for name in ("start", "end"):
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise ValueError(f"{where}: {name}: expected a number from 0 to 1, got {_short(value)}")


def _fields(where: str, value: object, names: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a mapping with {', '.join(names)}, got {_short(value)}")  # noqa: TRY004
    if set(value) != set(names):
        raise ValueError(f"{where}: expected the fields {', '.join(names)}, got {sorted(map(str, value))}")
    return value


def _short(value: object) -> str:
    """A value that a file made up, no longer than a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

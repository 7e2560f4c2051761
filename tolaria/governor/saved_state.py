"""The statistics in a governor's saved form: checked field by field, and brought to this version's layout.

A saved form may be damaged or crafted, and ``torch.load(weights_only=True)`` lets any values through. The
ops bound what they index, so nothing corrupts memory; but a governor that counts from NaN, or believes that
it has no slots, would watch over nothing without saying so. What no governor reaches is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tolaria import ops
from tolaria.governor.config import GovernorConfig
from tolaria.governor.plain_values import is_number, said
from tolaria.ops import SHIFT_ARMED, MemoryField, PanicReason, StateField

MAX_COUNT = 2**52
"""Counts above this are refused: half of where a float64 stops counting."""

_MEMORIES = ("", "slot_0.", "slot_1.")


class _Rule(NamedTuple):
    wanted: str
    holds: Callable[[float], bool]


def _whole(low: int, high: int) -> _Rule:
    """Comparisons with NaN are false, so ``int`` only meets numbers in range."""
    high = min(high, MAX_COUNT)
    return _Rule(f"a whole number from {low} to {high}", lambda v: low <= v <= high and v == int(v))


_COUNT = _whole(0, MAX_COUNT)
_COUNT_OR_NONE = _whole(-1, MAX_COUNT)
_FLAG = _whole(0, 1)
_SLOT_OR_NONE = _whole(-1, 1)
_FINITE = _Rule("a finite number", math.isfinite)
_AT_LEAST_0 = _Rule("a finite number of at least 0", lambda v: 0 <= v < math.inf)
_NOT_BELOW_0 = _Rule("a number not below 0", lambda v: not v < 0)
_ANY = _Rule("a number", lambda v: True)


def _rules(config: GovernorConfig) -> dict[str, _Rule]:
    """What each field may hold; one that is not listed counts."""
    return {
        "reason": _whole(0, len(PanicReason) - 1),
        **dict.fromkeys(("loss", "mean", "std", "gradient_norm", "gradient_threshold"), _ANY),
        **dict.fromkeys(("threshold_absolute", "threshold_statistical", "threshold_multiplier"), _ANY),
        "reward": _Rule("a finite number of at most 0", lambda v: -math.inf < v <= 0),
        "life_mean": _ANY,  # it overflows where losses do
        "life_m2": _NOT_BELOW_0,
        "cooldown_left": _whole(0, config.cooldown),
        "attached": _Rule("1, since a governor has slots", lambda v: v == 1),
        "candidate_done": _whole(0, 3),
        "history_size": _whole(0, config.window),
        "gradient_size": _whole(0, config.window),
        "drift_count": _whole(0, max(1, config.drift_horizon)),
        "shift_count": _whole(0, config.shift_horizon),
        "shift_armed": _whole(0, int(SHIFT_ARMED)),
        **dict.fromkeys(("shift_spread", "shift_wander", "shift_gradient"), _AT_LEAST_0),
        # With a horizon of 1 rounding can take a variance below 0; with any other it cannot.
        "drift_variance": _FINITE if config.drift_horizon == 1 else _AT_LEAST_0,
        **dict.fromkeys(("drift", "drift_sum", "collapse", "shift_sum"), _AT_LEAST_0),
        **dict.fromkeys(("life_min", "life_max", "last_healthy", "drift_mean", "learnt_level"), _FINITE),
        **dict.fromkeys(("shift_level", "shift_top", "shift_fast"), _FINITE),
        **dict.fromkeys(("rollback", "restore_order", "last_good", "learnt", "held"), _FLAG),
        **dict.fromkeys(("capture_order_0", "capture_order_1", "candidate"), _SLOT_OR_NONE),
        **dict.fromkeys(("tensor_index", "candidate_bad", "suspect"), _COUNT_OR_NONE),
        **dict.fromkeys(("restored_capture", "restored_step"), _COUNT_OR_NONE),
    }


_OF_STEPS = (
    *("life_count", "panics", "steps_lost", "restored_step", "slot_step_0", "slot_step_1"),
    *("anchor_step", "due_from", "suspect_since"),
    *("consecutive", "lobotomy_pending", "skips"),
)
"""Fields that cannot have counted more steps than there were."""


def checked_state(saved: object, config: GovernorConfig, version: int) -> Tensor:
    """The statistics of a saved form, float64 ``(fields, 1)`` in this version's layout, in new memory.

    Args:
        saved: what stands under ``"state"``: a list of numbers, up to version 3 a tensor.
        config: the settings that it was saved with.
        version: the saved form's; an older one is converted.

    Raises:
        ValueError: a field holds what no governor writes; the message names it.
    """
    names = _VERSIONS.get(version, (_names(StateField), _names(MemoryField)))
    length = len(names[0]) + 3 * (len(names[1]) + 2 * config.window)
    column = (_listed_column if version > 3 else _tensor_column)(saved, length)
    values = dict(_named(column, *names, config.window))
    _check_fields(values, config)
    _check_windows(values, config.window)
    _check_relations(values)
    values.setdefault("due_from", values["anchor_step"])  # up to version 4 they were one
    fresh = ops.governor_state(1, window=config.window)[:, 0].tolist()
    current = _named(fresh, _names(StateField), _names(MemoryField), config.window)
    return torch.tensor(
        [[values.get(name, born)] for name, born in current], dtype=torch.float64, device="cpu"
    )


def fitted(state: Tensor, config: GovernorConfig) -> Tensor:
    """Checked statistics ``(fields, 1)`` brought under other settings, in new memory.

    Of another window's losses and gradient norms the newest stay that fit. A cooldown and the drift baseline
    count no further than the settings let them, and without a drift test there is no baseline.
    """
    head, memories = state[: len(StateField), 0].clone(), state[len(StateField) :, 0].view(3, -1).clone()
    counts, windows = memories[:, : len(MemoryField)], memories[:, len(MemoryField) :].view(3, 2, -1)
    kept = windows
    if windows.shape[2] != config.window:
        kept = windows.new_zeros(3, 2, config.window)
        for which in range(3):
            for kind, field in enumerate((MemoryField.history_size, MemoryField.gradient_size)):
                size = int(counts[which, field])
                most = min(size, config.window)
                kept[which, kind, :most] = windows[which, kind, size - most : size]
                counts[which, field] = most
    head[StateField.cooldown_left].clamp_(max=float(config.cooldown))
    counts[:, MemoryField.drift_count].clamp_(max=float(config.drift_horizon))
    counts[:, MemoryField.shift_count].clamp_(max=float(config.shift_horizon))
    if config.shift_horizon == 0:
        counts[:, MemoryField.shift_count : MemoryField.shift_armed + 1] = 0.0
    if config.drift_horizon == 0:
        counts[:, MemoryField.drift_count : MemoryField.drift_sum + 1] = 0.0
    elif config.drift_horizon > 1:
        counts[:, MemoryField.drift_variance].clamp_(min=0.0)  # rounding took it there, at a horizon of 1
    return torch.cat([head, torch.cat([counts, kept.flatten(1)], dim=1).flatten()]).unsqueeze(1)


def _listed_column(saved: object, length: int) -> list[float]:
    """The numbers of a list of ``length``."""
    if not isinstance(saved, list | tuple):
        raise ValueError(f"state: expected a list of numbers, got {type(saved).__name__}")  # noqa: TRY004 (data, not an argument)
    if len(saved) != length:
        raise ValueError(f"state: expected {length} numbers, got {len(saved)}")
    for i, value in enumerate(saved):
        if not is_number(value):
            raise ValueError(f"state[{i}]: expected a number, got {said(value)}")
    return [float(value) for value in saved]


def _tensor_column(saved: object, length: int) -> list[float]:
    """The values of a strided float64 tensor ``(length, 1)`` wherever it lies and whatever it shares."""
    # A subclass may answer anything; a wrapper has no memory of its own.
    if not isinstance(saved, Tensor) or type(saved) not in (Tensor, torch.nn.Parameter):
        raise ValueError(f"state: expected a plain tensor, got {type(saved).__name__}")
    fits = saved.layout == torch.strided and saved.dtype == torch.float64 and saved.device.type != "meta"
    if not fits or tuple(saved.shape) != (length, 1):
        raise ValueError(
            f"state: expected float64 statistics of shape ({length}, 1), got {saved.dtype} of shape "
            f"{tuple(saved.shape)}, {saved.layout}, on {saved.device}"
        )
    column: list[float] = saved.detach().cpu().reshape(length).tolist()
    return column


def _names(enumeration: type[StateField] | type[MemoryField]) -> tuple[str, ...]:
    return tuple(field.name for field in enumeration)


def _named(
    column: Sequence[float], fields: Sequence[str], memory: Sequence[str], window: int
) -> Iterator[tuple[str, float]]:
    """The values of a column with their names, in its order."""
    ends = [f"{kind}[{i}]" for kind in ("losses", "gradient_norms") for i in range(window)]
    names = [*fields, *(which + name for which in _MEMORIES for name in (*memory, *ends))]
    return zip(names, column, strict=True)


def _check_fields(values: dict[str, float], config: GovernorConfig) -> None:
    rules = _rules(config)
    for name, value in values.items():
        rule = rules.get(name.rpartition(".")[2], _COUNT)
        if not name.endswith("]") and not rule.holds(value):
            raise ValueError(f"state.{name}: expected {rule.wanted}, got {value!r}")


def _check_windows(values: dict[str, float], window: int) -> None:
    """Losses and norms that count are finite, or every threshold would be NaN and nothing ever an anomaly."""
    for which in _MEMORIES:
        for kind, size in (("losses", "history_size"), ("gradient_norms", "gradient_size")):
            for i in range(window):
                value = values[f"{which}{kind}[{i}]"]
                if i < values[which + size] and not math.isfinite(value):
                    raise ValueError(f"state.{which}{kind}[{i}]: expected a finite number, got {value!r}")


def _check_relations(values: dict[str, float]) -> None:
    step = values["step"]
    most = {name: ("step", step) for name in values if name.rpartition(".")[2] in _OF_STEPS}
    most["promotion_count"] = ("capture_count", values["capture_count"])
    if values["life_count"] > 0:
        most["life_min"] = ("life_max", values["life_max"])
    for name, (other, limit) in most.items():
        if values[name] > limit:
            raise ValueError(f"state.{name}: expected at most state.{other}, {limit!r}, got {values[name]!r}")


_FIELDS_OF_VERSION_2 = """
step reason rollback loss mean std threshold_absolute threshold_statistical threshold_multiplier
gradient_norm gradient_threshold drift panics tensor_index reward
capture_order_0 capture_order_1 restore_order
life_count life_mean life_m2 life_min life_max
cooldown_left rollback_count capture_count promotion_count attached
last_good candidate candidate_done candidate_bad candidate_healthy anchor_step
slot_step_0 slot_step_1 slot_capture_0 slot_capture_1
restored_capture restored_step steps_lost events
"""
_MEMORY_OF_VERSION_2 = """
history_size last_healthy consecutive lobotomy_pending gradient_size
drift_count drift_mean drift_variance drift_sum
"""
_VERSION_2 = (tuple(_FIELDS_OF_VERSION_2.split()), tuple(_MEMORY_OF_VERSION_2.split()))
_SINCE_5 = {"suspect", "suspect_since", "suspect_count", "due_from"}
_VERSION_4 = (tuple(n for n in _names(StateField) if n not in _SINCE_5), (*_VERSION_2[1], "skips"))
_VERSIONS = {2: _VERSION_2, 3: _VERSION_4, 4: _VERSION_4}
"""Older layouts; what they lack is as in a fresh governor."""

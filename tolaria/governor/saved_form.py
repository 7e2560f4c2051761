"""The plain values in a governor's saved form: settings, loss of guessing, rollbacks; checked by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from tolaria.governor.config import GovernorConfig
from tolaria.governor.plain_values import is_integer, is_number, said
from tolaria.governor.saved_state import MAX_COUNT
from tolaria.governor.validation import check_saved_validation
from tolaria.ops import PanicReason
from tolaria.telemetry.verdict import GovernorReport

VERSION = 5
"""Of the saved form. Version 4 judged collapses by the classic rule, judged no magnitudes, and lowered rates
for good; version 3 kept the statistics in a tensor, and numbers that JSON does not know as they are; version
2 counted neither skipped steps nor restores without progress."""

_SINCE_5 = {
    *("lobotomy_rule", "collapse_patience", "lr_recovery_steps", "skip_batches", "validation_patience"),
    *("shift_horizon", "shift_slack", "shift_threshold", "shift_spike", "suspicious_state"),
}
_POLICY_SINCE_5 = {"batches", "rates", "validation"}


_NUMBERS = ("own", "lowered", "values")
"""Lists of numbers in what the policy saves; other lists count."""


def check_keys(where: str, saved: Mapping[Any, Any], known: set[str], *, may_lack: bool = False) -> None:
    """``saved`` must have the ``known`` keys and no other.

    Raises:
        ValueError: it has not; the message names them.
    """
    place = f"{where}: " if where else ""
    unknown = sorted(repr(key) for key in saved if key not in known)
    if unknown:
        raise ValueError(f"{place}expected no other keys than {sorted(known)}, got {', '.join(unknown)}")
    missing = sorted(known - set(saved))
    if missing and not may_lack:
        raise ValueError(f"{place}expected the keys {sorted(known)}, it lacks {', '.join(missing)}")


def checked_config(saved: object, version: int) -> GovernorConfig:
    """The settings of a saved form; those that an older version lacks are what it did, or their defaults.

    Raises:
        ValueError: one is unknown, missing, no plain value or out of range.
    """
    settings = _mapping("config", saved)
    known = {f.name for f in fields(GovernorConfig)}
    check_keys("config", settings, known if version > 4 else known - _SINCE_5, may_lack=version == 2)
    for name, value in settings.items():
        values = value if isinstance(value, tuple | list) and len(value) == 2 else (value,)
        for part in values:
            if not (part is None or isinstance(part, bool | str) or is_number(part)):
                raise ValueError(f"config.{name}: expected a plain value, got {said(value)}")
    chosen = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    if version < 5:
        chosen |= {"lobotomy_rule": "classic", "suspicious_state": "off"}
    return GovernorConfig(**({"skips_before_rollback": 0, **chosen} if version == 2 else chosen))


def check_random_guess_loss(saved: object) -> None:
    """Nothing, or a positive finite number.

    Raises:
        ValueError: it is neither.
    """
    if saved is not None and not (is_number(saved) and 0 < saved < math.inf):
        raise ValueError(f"random_guess_loss: expected a positive finite number or None, got {said(saved)}")


def check_policy(saved: object, fresh: Mapping[str, Any], version: int) -> None:
    """The past rollbacks: shaped like ``fresh``, a saved form without any.

    Raises:
        ValueError: a key, a report or a count is not as it should be.
    """
    known = {name: born for name, born in fresh.items() if version > 4 or name not in _POLICY_SINCE_5}
    _check_like("policy", saved, known, version)
    if version > 4:
        policy = _mapping("policy", saved)
        _check_rates(policy["rates"])
        check_saved_validation(policy["validation"])


def checked_magnitudes(saved: object) -> dict[str, tuple[float, float]]:
    """How large each tensor was: its largest magnitude, and in how many promoted captures; by name.

    Raises:
        ValueError: a name or a number is not as it should be.
    """
    found = {}
    for name, values in _mapping("magnitudes", saved).items():
        where = f"magnitudes[{said(name)}]"
        if not isinstance(name, str):
            raise ValueError(f"{where}: expected the name of a tensor")  # noqa: TRY004 (data, not an argument)
        if not (isinstance(values, list | tuple) and len(values) == 2 and all(map(is_number, values))):
            raise ValueError(f"{where}: expected two numbers, got {said(values)}")
        largest, promoted = values
        if not 0 <= largest < math.inf:
            raise ValueError(f"{where}[0]: expected a finite number of at least 0, got {said(largest)}")
        _check_count(f"{where}[1]", promoted)
        found[name] = (float(largest), float(promoted))
    return found


def _check_like(where: str, saved: object, fresh: Mapping[str, Any], version: int) -> None:
    values = _mapping(where, saved)
    check_keys(where, values, set(fresh), may_lack=version == 2)
    for name, value in values.items():
        place, born = f"{where}.{name}", fresh[name]
        if isinstance(born, Mapping):
            _check_like(place, value, born, version)
        elif isinstance(born, list):
            if not isinstance(value, list | tuple):
                raise ValueError(f"{place}: expected a list, got {said(value)}")  # noqa: TRY004 (data, not an argument)
            check = {"reports": _check_report, **dict.fromkeys(_NUMBERS, _check_number)}.get(name)
            for i, item in enumerate(value):
                (check or _check_count)(f"{place}[{i}]", item)
        else:
            _check_count(place, value)


def _check_count(where: str, value: object, low: int = 0) -> None:
    if not is_integer(value) or not low <= value <= MAX_COUNT:
        raise ValueError(f"{where}: expected a whole number from {low} to {MAX_COUNT}, got {said(value)}")


def _check_number(where: str, value: object) -> None:
    if not is_number(value):
        raise ValueError(f"{where}: expected a number, got {said(value)}")


def _check_rates(rates: Mapping[str, Any]) -> None:
    own, lowered = len(rates["own"]), len(rates["lowered"])
    if own != lowered:
        raise ValueError(f"policy.rates.lowered: expected as many rates as in own, {own}, got {lowered}")


def _check_report(where: str, saved: object) -> None:
    """One :class:`GovernorReport` as plain values; what has a default may be absent, as in an older one."""
    values, known = _mapping(where, saved), {f.name: f for f in fields(GovernorReport)}
    check_keys(where, values, set(known), may_lack=True)
    for name, kind in known.items():
        if name in values:
            _check_report_field(f"{where}.{name}", kind, values[name])
        elif kind.default is MISSING:
            raise ValueError(f"{where}: expected the keys {sorted(known)}, it lacks {name}")


def _check_report_field(where: str, kind: Field[Any], value: object) -> None:
    if kind.type == "PanicReason":
        if not is_integer(value) or value not in set(PanicReason):
            raise ValueError(f"{where}: expected a number from 0 to {max(PanicReason)}, got {said(value)}")
    elif kind.type == "int":
        _check_count(where, value, low=-1)
    elif kind.type == "int | str | None":
        if not (value is None or isinstance(value, str) or is_integer(value)):
            raise ValueError(f"{where}: expected a whole number, a string or None, got {said(value)}")
    elif kind.type == "str | None":
        if not (value is None or isinstance(value, str)):
            raise ValueError(f"{where}: expected a name or None, got {said(value)}")
    else:
        wanted = 3 if kind.type == "tuple[float, float, float]" else 1
        parts = value if wanted == 3 else (value,)
        if not (isinstance(parts, tuple | list) and len(parts) == wanted and all(map(is_number, parts))):
            raise ValueError(
                f"{where}: expected {'three numbers' if wanted == 3 else 'a number'}, got {said(value)}"
            )


def _mapping(where: str, value: object) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a dict, got {said(value)}")  # noqa: TRY004 (as above)
    return value

"""Rates that are lowered for a time, in a governor's saved form."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tolaria.errors import UncoveredWarning
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.lowered_rates import LoweredRates, RatesThen
from tolaria.snapshot.own_rates import OwnRates
from tolaria.snapshot.rates import rates_of


def plain_rates(covered: CoveredState | None, then: RatesThen | None) -> dict[str, Any]:
    """Plain values for :func:`loaded_rates`; reads rates that are tensors, so it waits for a device.

    Args:
        covered: what is governed.
        then: its rates at some moment; None: they were not lowered for a time.
    """
    if covered is None or then is None:
        return {"times": 0, "healthy_since": 0, "own": [], "lowered": []}
    keys = [rate.key for rate in rates_of(covered.optimizers, covered.schedulers)]
    keys = [key for key in keys if key in then.own and key in then.live]
    return {
        "times": then.times,
        "healthy_since": then.healthy_since,
        "own": [number for key in keys for number in _numbers(then.own[key])],
        "lowered": [number for key in keys for number in _numbers(then.live[key])],
    }


def loaded_rates(saved: Mapping[str, Any] | None, covered: CoveredState) -> LoweredRates:
    """What was lowered for a time goes on being so; a rate that is not the saved one is its own.

    Args:
        saved: what :func:`plain_rates` said, checked; None: nothing, or the rates are lowered for good.
        covered: what is governed, its state loaded.
    """
    rates = LoweredRates()
    if saved is None or not saved["own"]:
        return rates
    covered.find_schedules()
    places = list(rates_of(covered.optimizers, covered.schedulers))
    live = [_numbers(place.value()) for place in places]
    if sum(map(len, live)) != len(saved["own"]):
        warnings.warn(
            f"governor: expected the {len(saved['own'])} rates that were lowered for a time when the state "
            f"was saved, got optimizers and schedulers with {sum(map(len, live))}: these stay as they are; "
            "attach the governor with the same ones",
            UncoveredWarning,
            stacklevel=5,
        )
        return rates
    own, lowered = iter(saved["own"]), iter(saved["lowered"])
    values = {}
    for place, now in zip(places, live, strict=True):
        mine, then = [next(own) for _ in now], [next(lowered) for _ in now]
        if all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(now, then, strict=True)):
            values[place.key] = _like(place.value(), iter(mine))
    if values:
        rates.own = OwnRates(covered.optimizers, covered.schedulers, values)
        rates.times = rates.reflected = rates.reflected_there = saved["times"]
        rates.healthy_since = saved["healthy_since"]
    return rates


def _numbers(value: Any) -> list[float]:  # noqa: ANN401  (a number, a tensor, or a list of these)
    if isinstance(value, list):
        return [number for each in value for number in _numbers(each)]
    return [value.item() if isinstance(value, Tensor) else value]  # sync: it is asked for


def _like(value: Any, numbers: Iterator[float]) -> Any:  # noqa: ANN401  (as above)
    """``numbers`` in the form of ``value``."""
    if isinstance(value, list):
        return [_like(each, numbers) for each in value]
    number = next(numbers)
    return torch.full_like(value, number) if isinstance(value, Tensor) else number

"""Calls that may be made under ``torch.inference_mode``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def outside_inference(call: Callable[P, T]) -> Callable[P, T]:
    """``call``, which may be made under ``torch.inference_mode``: what it makes is used in training."""

    @functools.wraps(call)
    def made_outside(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return call(*args, **kwargs)
        with torch.inference_mode(False):
            return call(*args, **kwargs)

    return made_outside

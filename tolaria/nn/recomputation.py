"""Which forwards are run anew by activation checkpointing, and what they drew the first time.

A recomputation is the same call of the model a second time, in a backward pass. Several forwards may lie
before one backward (siamese networks, micro-batches, a forward for metrics), so that "what the latest one
drew" is no answer: what a forward draws is kept with the object that autograd keeps for its recomputation.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType, FrameType, GeneratorType
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.utils.checkpoint as checkpointing
from torch.autograd.function import FunctionCtx

T = TypeVar("T")

_ATTRIBUTE = "_tolaria_draws"
_NON_REENTRANT = getattr(checkpointing, "_CheckpointFrame", ())


class _Region(NamedTuple):
    """A checkpointed call that is under way."""

    key: Any
    """What autograd keeps of it: a checkpoint's frame, or the context of an autograd function."""
    run: int | None
    """None: the call itself; a number for each time it is run anew."""


@dataclass(slots=True)
class _Draws(Generic[T]):
    """What one owner drew in a checkpointed call, in order."""

    values: list[T] = field(default_factory=list)
    run: int | None = None
    position: int = 0

    def again(self, run: int) -> T | None:
        """What comes next in the recomputation ``run``; None: more is asked than was drawn."""
        if run != self.run:
            self.run, self.position = run, 0
        if self.position >= len(self.values):
            return None
        self.position += 1
        return self.values[self.position - 1]


def replayed(owner: object, now: T) -> T | None:
    """What ``owner`` drew where the call that is run anew first came by; None: it is none, or is not known.

    Args:
        owner: whose draws they are; can be referred to weakly.
        now: what is drawn if nothing is replayed; noted with the checkpointed calls that are under way.
    """
    regions = list(_regions())
    value: T | None = None
    for region in regions:
        draws = _draws_of(owner, region.key) if region.run is not None else None
        if draws is not None and region.run is not None and draws.values:
            value = draws.again(region.run)
            break
    for region in regions:
        if region.run is None:  # a call inside of one that is run anew may be run anew itself
            _draws_of(owner, region.key).values.append(now if value is None else value)
    return value


def is_backward() -> bool:
    """Whether a backward pass is under way in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def _draws_of(owner: object, key: object) -> _Draws[Any]:
    if not hasattr(key, _ATTRIBUTE):
        setattr(key, _ATTRIBUTE, weakref.WeakKeyDictionary())
    held: weakref.WeakKeyDictionary[object, _Draws[Any]] = getattr(key, _ATTRIBUTE)
    return held.setdefault(owner, _Draws())


def _regions() -> Iterator[_Region]:
    """The checkpointed calls that are under way, innermost first, each once."""
    seen: set[int] = set()
    for region in _all_regions():
        if id(region.key) not in seen:
            seen.add(id(region.key))
            yield region


def _all_regions() -> Iterator[_Region]:
    hooked = _key_of_hooks()
    if hooked is not None:  # one that begins and ends in hooks of a module is not on the stack
        yield _Region(hooked, None)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        key = _key_of(frame)
        if key is not None:
            is_again = frame.f_code.co_name in ("backward", "unpack_hook")
            yield _Region(key, hash((torch._C._current_graph_task_id(), id(frame))) if is_again else None)
        frame = frame.f_back


def _key_of(frame: FrameType) -> object | None:
    """What autograd keeps of the checkpointed call that ``frame`` runs; None: it runs none."""
    if frame.f_code.co_filename == checkpointing.__file__:
        for value in frame.f_locals.values():
            if isinstance(value, GeneratorType) and value.gi_frame is not None:
                value = value.gi_frame.f_locals.get("new_frame")
            if _NON_REENTRANT and isinstance(value, _NON_REENTRANT):
                return value  # type: ignore[no-any-return]
    if _takes_context(frame.f_code):
        context = frame.f_locals.get(frame.f_code.co_varnames[0])
        if isinstance(context, FunctionCtx):
            return context
    return None


def _takes_context(code: CodeType) -> bool:
    return code.co_name in ("forward", "backward") and code.co_argcount > 0


def _key_of_hooks() -> object | None:
    """What the innermost hooks for saved tensors keep, if those are a checkpoint's."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = top(False) if top is not None else None
    for cell in getattr(hooks[0], "__closure__", None) or () if hooks else ():
        if _NON_REENTRANT and isinstance(cell.cell_contents, _NON_REENTRANT):
            return cell.cell_contents  # type: ignore[no-any-return]
    return None

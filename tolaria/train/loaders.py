"""Batches of a loader that somebody may be in the middle of, whose epoch goes on as if nobody had looked."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

_DEPTH = 3  # of wrappers around a DataLoader

_OURS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Iterators with persistent workers whose last epoch was begun here, and that epoch's iterator of places."""


@contextmanager
def undisturbed(loader: Iterable[object]) -> Iterator[Iterable[object]]:
    """What to iterate instead of ``loader``, so that an iteration of it that is under way is left as it is.

    A DataLoader with persistent workers has one iterator, which starts over for whoever asks next; while an
    epoch of somebody else's may be under way it gets workers of its own, for as long as this context lasts. A
    loader that is its own iterator is copied (not what it refers to), unless it is a one-shot iterator.
    Loaders inside of others are found in their attributes.
    """
    with ExitStack() as stack:
        for each in _persistent(loader, _DEPTH):
            stack.enter_context(_aside(each))
        yield _own_copy(loader)


@contextmanager
def _aside(loader: DataLoader[Any]) -> Iterator[None]:
    """Put the loader's iterator back afterwards, unless nobody else has begun an epoch of it."""
    before: Any = loader._iterator
    is_ours = before is None or _OURS.get(before) is getattr(before, "_sampler_iter", None)
    if not is_ours:
        loader._iterator = None
    try:
        yield
    finally:
        now: Any = loader._iterator
        if not is_ours:
            loader._iterator = before
        elif now is not None:
            _OURS[now] = getattr(now, "_sampler_iter", None)


def _persistent(loader: object, depth: int) -> list[DataLoader[Any]]:
    """The DataLoaders with persistent workers in ``loader``, each once."""
    found: dict[int, DataLoader[Any]] = {}
    if isinstance(loader, DataLoader) and hasattr(loader, "_iterator"):
        if loader.persistent_workers and loader.num_workers:
            found[id(loader)] = loader
    elif depth and not isinstance(loader, Tensor | nn.Module | Dataset | str | bytes):
        if isinstance(loader, list | tuple | dict):
            inside = list(loader.values()) if isinstance(loader, dict) else list(loader)
            inside = inside if len(inside) <= 16 else []  # batches, no loaders
        else:
            inside = list(getattr(loader, "__dict__", {}).values())
        for value in inside:
            found.update((id(each), each) for each in _persistent(value, depth - 1))
    return list(found.values())


def _own_copy(loader: Iterable[object]) -> Iterable[object]:
    """A copy of a loader whose ``__iter__`` sets itself back; else the loader."""
    kind = type(loader)
    is_own = hasattr(kind, "__next__") and hasattr(loader, "__dict__")
    if not is_own or hasattr(kind, "__del__") or not _starts_over(kind):
        return loader
    try:
        return copy.copy(loader)
    except (TypeError, ValueError, AttributeError):
        return loader


def _starts_over(kind: type) -> bool:
    """Whether ``__iter__`` does more than to return the iterator."""
    code = getattr(getattr(kind, "__iter__", None), "__code__", None)
    return code is not None and bool(code.co_names or len(code.co_varnames) > 1)

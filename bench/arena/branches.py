"""Runs that begin alike are run once up to where they part."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def can_branch() -> bool:
    """Whether this system forks, and torch computes in one thread: others do not live on in a child."""
    return hasattr(os, "fork") and torch.get_num_threads() == 1


def branch(tails: Sequence[Callable[[], T]]) -> list[T]:
    """What each returns, called in a process forked from this one, so that none sees what another did.

    Raises:
        RuntimeError: one failed; its traceback is on stderr.
    """
    return [_forked(tail) for tail in tails]


def _forked(tail: Callable[[], T]) -> T:
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _return_through(writer, tail)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError("a branch of the run failed; see above")
    result: T = pickle.loads(told)
    return result


def _return_through(writer: int, tail: Callable[[], object]) -> None:
    status = 1
    try:
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(tail(), pipe)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # neither finalizers nor exit handlers: they are the parent's

"""State dicts are made of states that were verified, whoever asks for them."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Sequence

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tolaria.governor import TolariaGovernor
from tolaria.integrations._found import world
from tolaria.snapshot.inner_optimizers import seen_through


class VerifiedStateDicts:
    """Has the state verified when the model, a module in it or an optimizer is asked for its state dict.

    All that save ask for it. Only in the thread that trains, and not while an exception is on its way. Of
    several ranks the first may save alone, and none can be verified alone: there it does nothing.

    Args:
        governor: verifies; held weakly.
        model: what is saved, or contains it.
        optimizers: its optimizers.
    """

    def __init__(self, governor: TolariaGovernor, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._governor = weakref.ref(governor)
        self._thread = threading.get_ident()
        self._handles: list[RemovableHandle] = []
        if world() is None:
            for module in model.modules():
                self._handles.append(module.register_state_dict_pre_hook(self))  # type: ignore[no-untyped-call]
            for optimizer in optimizers:
                self._handles.append(seen_through(optimizer).register_state_dict_pre_hook(self))

    def __call__(self, asked: nn.Module | Optimizer, prefix: str = "", keep_vars: bool = False) -> None:
        """Something is asked; a module that another asks in turn has a prefix."""
        governor = self._governor()
        if governor is None or prefix or threading.get_ident() != self._thread:
            return
        if governor._acting is None and sys.exc_info()[0] is None:
            governor.verify()

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return _for_copies, ()

    def close(self) -> None:
        """State dicts are made as ever."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _for_copies() -> Callable[..., None]:
    """What copies and pickles of the model have in its place: nobody governs them."""
    return _nothing


def _nothing(*args: object) -> None:
    return None

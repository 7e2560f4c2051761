"""Optimizers that wrap others: Lookahead and its kin, those with one for each kind of parameter."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from types import MethodType
from typing import Any

from torch.optim import Optimizer

_TRAINERS = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")
"""Packages whose wrappers decide when the optimizer inside steps, and keep nothing of their own."""


def seen_through(optimizer: Optimizer) -> Optimizer:
    """What steps: ``optimizer``, or the one inside if a trainer has wrapped it for its own purposes.

    Such a wrapper (AcceleratedOptimizer, that of Fabric, LightningOptimizer) has no hooks, or lends those of
    the one inside, which calls them with itself; and it is asked to step where no step is due.
    """
    while any(kind.__module__.partition(".")[0] in _TRAINERS for kind in type(optimizer).__mro__):
        inside = [v for name, v in vars(optimizer).items() if name in ("optimizer", "_optimizer")]
        if not inside or not isinstance(inside[0], Optimizer):
            break
        optimizer = inside[0]
    return optimizer


def inner_optimizers(optimizer: Optimizer) -> Iterator[tuple[str, Optimizer]]:
    """Optimizers with a state of their own among its attributes, or in a list or dict there, by name."""
    for name, value in vars(optimizer).items():
        if isinstance(value, Optimizer):
            yield from _own(name, value, optimizer)
        elif isinstance(value, dict) and name != "state":
            for key, each in value.items():
                if isinstance(each, Optimizer):
                    yield from _own(f"{name}[{key!r}]", each, optimizer)
        elif isinstance(value, list | tuple):
            for i, each in enumerate(value):
                if isinstance(each, Optimizer):
                    yield from _own(f"{name}[{i}]", each, optimizer)


def _own(name: str, inner: Optimizer, outer: Optimizer) -> Iterator[tuple[str, Optimizer]]:
    if inner.state is not outer.state:
        yield name, inner


def complete(optimizer: Optimizer) -> None:
    """Give one whose class never calls ``Optimizer.__init__``, as some that wrap do not, what it lacks.

    Its step runs hooks from then on: its own, not that of its class, whose other objects have none.
    """
    own: Any = optimizer  # what torch declares may be missing
    if not hasattr(own, "state"):
        own.state = defaultdict(dict)
    if hasattr(own, "_optimizer_step_pre_hooks"):
        return
    own._optimizer_step_pre_hooks, own._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    step = type(optimizer).step
    if not getattr(step, "hooked", False):
        own.step = MethodType(Optimizer.profile_hook_step(step), optimizer)


def with_inner(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """The optimizers and those that they wrap, each once and :func:`complete`; trainers' are seen through."""
    found: list[Optimizer] = []
    waiting = list(optimizers)
    while waiting:
        optimizer = seen_through(waiting.pop(0))
        if not any(optimizer is known for known in found):
            complete(optimizer)
            found.append(optimizer)
            waiting += [inner for _, inner in inner_optimizers(optimizer)]
    return found

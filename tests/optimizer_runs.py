"""Trainings under any optimizer, of which every bit can be compared; for ``tests/optimizer_packages.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Found = dict[str, object]
"""Leaves of a training state by path: tensors as their bytes, and numbers."""


def network() -> nn.Module:
    """Parameters of one, two and four dimensions; two of them have 4096 elements or more."""
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.Flatten(),
        nn.Linear(288, 64),
        nn.LayerNorm(64),
        nn.Tanh(),
        nn.Linear(64, 8),
    )


def _for_muon(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    matrices = [p for p in params if p.dim() > 1]
    return [
        {"params": matrices, "use_muon": True},
        {"params": [p for p in params if p.dim() < 2], "use_muon": False},
    ]


def _inner(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


MAKERS: tuple[Callable[[Any, nn.Module], Any], ...] = (
    lambda cls, model: cls(model.parameters(), lr=1e-3),
    lambda cls, model: cls(model.parameters(), lr=1e-3, momentum=0.9),
    lambda cls, model: cls(model.parameters()),
    lambda cls, model: cls(model, lr=1e-3),
    lambda cls, model: cls(model.named_parameters(), lr=1e-3),
    lambda cls, model: cls(_for_muon(model), lr=1e-3),
    lambda cls, model: cls(_for_muon(model)),
    lambda cls, model: cls(_inner(model)),
    lambda cls, model: cls(torch.optim.SGD(model.parameters(), lr=1e-3)),
    lambda cls, model: cls(model.parameters(), torch.optim.AdamW, lr=1e-3),
    lambda cls, model: cls(model, model.parameters(), torch.optim.AdamW, lr=1e-3),
    lambda cls, model: cls(model.parameters(), _inner(model)),
    lambda cls, model: cls(model.parameters(), lr=1e-3, num_iterations=100),
    lambda cls, model: cls(model.parameters(), _inner(model), model),
)
"""How optimizers are made: the first with which one trains is taken."""

STEPS = ("step", "closure", "graph", "closure and graph", "fused")
"""How they step: alone, with a closure, after a backward that keeps its graph, or within the backward."""


class Way(NamedTuple):
    """How an optimizer is made and steps."""

    make: Callable[[Any, nn.Module], Any]
    steps: str


class Run:
    """A network in training; two with the same numbers are the same, bit for bit."""

    def __init__(self, cls: Any, way: Way) -> None:
        torch.manual_seed(0)
        self.model = network()
        self.optimizer = way.make(cls, self.model)
        self._steps = way.steps
        self._mode("train")

    def _mode(self, name: str) -> None:
        """Schedule-free optimizers have a mode to train and one to evaluate."""
        mode = getattr(self.optimizer, name, None)
        if callable(mode):
            mode()

    def train(self, steps: int, first: int) -> None:
        """So many steps, on the batches from number ``first``."""
        for number in range(first, first + steps):
            torch.manual_seed(number)
            self._step(torch.randn(8, 4, 8, 8), torch.randint(8, (8,)))
        if steps:
            self._mode("eval")
            self._mode("train")

    def _step(self, inputs: Tensor, labels: Tensor) -> None:
        def loss() -> Tensor:
            return nn.functional.cross_entropy(self.model(inputs), labels)

        def closure() -> Tensor:
            self.model.zero_grad()
            found = loss()
            if hasattr(self.optimizer, "backward"):  # which scales the loss
                self.optimizer.backward(found)
            else:
                found.backward(create_graph="graph" in self._steps)
            return found

        if self._steps == "fused":
            self.optimizer.fused_backward(loss(), 1e-3)
            return
        closure()
        self.optimizer.step(closure) if "closure" in self._steps else self.optimizer.step()
        self.model.zero_grad()

    @property
    def covered(self) -> Any:
        """The optimizer to hand over: of a wrapper that is no whole ``Optimizer``, the one within."""
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            return self.optimizer.base
        return self.optimizer if hasattr(self.optimizer, "param_groups") else self.optimizer.optimizer

    def wreck(self) -> None:
        """NaN into every tensor of model and optimizer; numbers without a NaN become 0."""
        with torch.no_grad():
            for _, leaf in leaves((self.model.state_dict(), self.optimizer), {}):
                if isinstance(leaf, Tensor):
                    leaf.fill_(float("nan") if leaf.is_floating_point() or leaf.is_complex() else 0)

    def state(self) -> Found:
        """What must be equal: the parameters, and each optimizer's state and groups."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        found: Found = {f"model {name}": _bytes(tensor) for name, tensor in self.model.state_dict().items()}
        for path, leaf in leaves(self.optimizer, names):
            if "state" in path or "param_groups" in path:
                found[" ".join(path)] = _bytes(leaf) if isinstance(leaf, Tensor) else leaf
        return found


def leaves(root: object, names: dict[int, str]) -> Iterator[tuple[tuple[str, ...], object]]:
    """Tensors and numbers within, inner optimizers' and inner tensors too; ``names`` are those of keys."""
    stack: list[tuple[tuple[str, ...], object]] = [((), root)]
    seen: set[int] = set()
    while stack:
        path, thing = stack.pop()
        inner: dict[object, object] = {}
        if isinstance(thing, dict):
            inner = dict(thing)
        elif isinstance(thing, list | tuple):
            inner = dict(enumerate(thing))
        elif isinstance(thing, Tensor) and is_traceable_wrapper_subclass(thing):
            inner = {name: getattr(thing, name) for name in thing.__tensor_flatten__()[0]}
        elif isinstance(thing, Tensor | int | float):
            yield path, thing
        elif isinstance(thing, torch.optim.Optimizer) or hasattr(thing, "base"):
            inner = dict(vars(thing))
        if inner and id(thing) not in seen:
            seen.add(id(thing))
            for number, (key, value) in enumerate(inner.items()):
                name = f"tensor {number}" if isinstance(key, Tensor) else str(key)
                stack.append(((*path, names.get(id(key), name)), value))


def _bytes(tensor: Tensor) -> bytes:
    whole = tensor.detach().contiguous().reshape(-1)
    return bytes(whole.view(torch.uint8).numpy()) if whole.numel() else b""


def find_way(cls: Any) -> Way:
    """The first way in which it takes three steps and stays finite.

    Raises:
        Exception: there is none; what the first that could be made said.
    """
    tried: list[Exception] = []
    said: list[Exception] = []
    for make in MAKERS:
        for steps in STEPS:
            if steps == "fused" and not hasattr(cls, "fused_backward"):
                continue
            try:
                run = Run(cls, Way(make, steps))
            except Exception as error:
                said.append(error)
                break
            try:
                run.train(3, first=0)
            except Exception as error:
                tried.append(error)
                continue
            if all(bool(p.isfinite().all()) for p in run.model.parameters()):
                return Way(make, steps)
            tried.append(ValueError("it diverges"))
    raise (tried or said)[0]

"""Rolls back under every optimizer of the packages that are installed, and compares with ``load_state_dict``.

    PYTHONPATH=. python tests/optimizer_packages.py [--package NAME ...] [--only NAME ...] [--list]

Each optimizer trains a small network with vectors, matrices and convolutions, some of them large enough to be
quantised. It is captured before its first step (fresh) and after a few (warm), by ``TolariaGovernor`` and by
``tolaria.Snapshot``. Then it trains on, every tensor of model and optimizer is overwritten with NaN, it is
rolled back and trains on again. All bits of it must be those of a run that went back by deep copies of
``state_dict()`` and ``load_state_dict``; where these lose something, those of an uninterrupted run.

One line for each optimizer and a count at the end; exit status 1 if one differs or crashes. Packages that are
not installed are named and left out, as are optimizers that cannot run here without tolaria.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import io
import itertools
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tolaria import GovernorConfig, Snapshot, SnapshotError, TolariaGovernor

PACKAGES = {
    "bitsandbytes": "bitsandbytes.optim",
    "torchao": "torchao.optim",
    "schedulefree": "schedulefree",
    "timm": "timm.optim",
    "pytorch_optimizer": "pytorch_optimizer",
    "torch_optimizer": "torch_optimizer",
    "optimi": "optimi",
    "prodigyopt": "prodigyopt",
    "lion_pytorch": "lion_pytorch",
    "came_pytorch": "came_pytorch",
    "dadaptation": "dadaptation",
    "adam_mini": "adam_mini",
    "torch": "torch.optim",
}
"""The name of a package, and the module that exports its optimizers."""

WARM, DETOUR, REST = 5, 4, 6
"""Steps before a warm capture, between the capture and the wreck, and after the rollback."""

Found = dict[str, object]
"""Leaves of a training state by path: tensors as their bytes, and numbers."""


# -- the optimizers ------------------------------------------------------------------------------------------


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


# -- the comparison ------------------------------------------------------------------------------------------


def by_plain(cls: Any, way: Way, warm: int) -> Found:
    """The end of a run that goes back by ``load_state_dict``."""
    run = Run(cls, way)
    run.train(warm, first=0)
    saved = copy.deepcopy(run.model.state_dict()), _copied(run.optimizer.state_dict())
    run.train(DETOUR, first=100)
    run.wreck()
    run.model.load_state_dict(saved[0])
    run.optimizer.load_state_dict(saved[1])
    run.train(REST, first=200)
    return run.state()


def _copied(state: Any) -> Any:
    """A deep copy; of state that cannot be cloned (torchao's), one that was saved and loaded."""
    try:
        return copy.deepcopy(state)
    except NotImplementedError:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=False)


def uninterrupted(cls: Any, way: Way, warm: int) -> Found:
    """The end of a run that never went back."""
    run = Run(cls, way)
    run.train(warm, first=0)
    run.train(REST, first=200)
    return run.state()


def rolled_back(cls: Any, way: Way, warm: int, tool: str) -> Found:
    """The end of a run that goes back by tolaria."""
    run = Run(cls, way)
    run.train(warm, first=0)
    # What is no whole optimizer goes beside the one within.
    extras = {} if run.covered is run.optimizer else {"wrapper": run.optimizer}
    if tool == "governor":
        config = GovernorConfig(snapshot_interval=1000)
        back = TolariaGovernor(run.model, run.covered, extras=extras, config=config).execute_rollback
    else:
        snapshot = Snapshot(run.model, run.covered, extras=extras)
        snapshot.capture()
        back = snapshot.restore  # type: ignore[assignment]
    run.train(DETOUR, first=100)
    run.wreck()
    back()
    run.train(REST, first=200)
    return run.state()


def difference(a: Found, b: Found) -> str:
    """The first path at which two states differ; empty: none."""
    for path in sorted(a.keys() | b.keys()):
        if path not in a or path not in b:
            return f"{path} is in one alone"
        if a[path] != b[path]:
            return path
    return ""


def judge(cls: Any, way: Way) -> tuple[str, str]:
    """A verdict, and what there is to say of it."""
    notes: list[str] = []
    for warm, tool in itertools.product((0, WARM), ("governor", "snapshot")):
        case = f"{'warm' if warm else 'fresh'}, {tool}"
        through = uninterrupted(cls, way, warm)
        try:
            plain = by_plain(cls, way, warm)
            lost = difference(plain, through)
        except Exception as error:
            plain, lost = through, _said(error)
        try:
            ours = rolled_back(cls, way, warm, tool)
        except SnapshotError as error:
            return "refused", f"{case}: {error}"
        except Exception as error:
            return "crashed", f"{case}: {_said(error)}"
        wrong = difference(ours, plain)
        if wrong and difference(ours, through):
            return "differs", f"{case}: {wrong}; from an uninterrupted run: {difference(ours, through)}"
        if wrong or (lost and plain is through):
            notes.append(f"{case}: as uninterrupted; load_state_dict alone: {lost or wrong}")
    return "exact", "; ".join(notes)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def work(cls: Any, channel: Connection) -> None:
    """Judge one optimizer and send the verdict."""
    torch.set_num_threads(1)
    sys.stdout = io.StringIO()  # some print whenever they switch their mode
    warnings.simplefilter("ignore")
    try:
        way = find_way(cls)
    except Exception as error:
        channel.send(("cannot run", _said(error)))
        return
    channel.send(judge(cls, way))


def in_a_child(cls: Any, seconds: float) -> tuple[str, str]:
    """Judge one optimizer in a forked process, which it may take down with it."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=work, args=(cls, there))
    child.start()
    there.close()
    try:
        return here.recv() if here.poll(seconds) else ("crashed", f"no end after {seconds:.0f} s")
    except EOFError:
        child.join()
        return "crashed", f"the process ended with {child.exitcode}"
    finally:
        child.kill()
        child.join()


def _made_by_name(timm: Any, name: str, *args: object, **settings: object) -> Any:
    return timm.get_optimizer_class(name)(*args, **settings)


def exported(module: str) -> dict[str, Any]:
    """The optimizer classes that a module exports, and wrappers that are none but behave as one; by name."""
    found = importlib.import_module(module)
    by_name: dict[str, Any] = {}
    if hasattr(found, "get_supported_optimizers"):  # pytorch_optimizer: more than it exports
        more = map(found.load_optimizer, found.get_supported_optimizers())
        by_name = {cls.__name__: cls for cls in more}
    elif hasattr(found, "list_optimizers"):  # timm: with settings bound to its classes and torch's
        return {name: partial(_made_by_name, found, name) for name in found.list_optimizers()}
    return {
        name: thing
        for name, thing in sorted((vars(found) | by_name).items())
        if inspect.isclass(thing) and thing is not torch.optim.Optimizer and not inspect.isabstract(thing)
        if all(callable(getattr(thing, method, None)) for method in ("step", "load_state_dict", "zero_grad"))
    }


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--package", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="optimizers by class name")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    parser.add_argument("--seconds", type=float, default=300, help="most for one optimizer")
    options = parser.parse_args()
    counts: dict[str, Counter[str]] = {}
    warnings.simplefilter("ignore")
    for package in options.package:
        try:
            classes = exported(PACKAGES[package])
        except ImportError as error:
            print(f"{package}: left out ({error})")
            continue
        counts[package] = Counter()
        for name, cls in classes.items():
            if options.only and name not in options.only:
                continue
            verdict, note = ("listed", "") if options.list else in_a_child(cls, options.seconds)
            counts[package][verdict] += 1
            print(f"{package:18} {name:28} {verdict:10} {note}", flush=True)
    for package, found in counts.items():
        print(f"{package}: " + ", ".join(f"{n} {verdict}" for verdict, n in sorted(found.items())))
    whole = sum(counts.values(), Counter())
    print("in all: " + ", ".join(f"{n} {verdict}" for verdict, n in sorted(whole.items())))
    return bool(whole["differs"] + whole["crashed"])


if __name__ == "__main__":
    sys.exit(main())

"""What can go wrong, each as an object that a run calls at its places."""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from tolaria import ops
from tolaria.errors import TolariaError

if TYPE_CHECKING:
    from tolaria.chaos.target import ChaosRun
    from tolaria.governor import GovernorEvent

Place = Literal["gradient", "parameter", "moment", "buffer"]


class CaptureInterruptedError(TolariaError):
    """What :class:`InterruptedCapture` raises in the middle of a capture."""


class ChaosFault:
    """Something that goes wrong; every method does nothing here.

    A run calls the methods from ``start`` on for ``duration`` steps, with ``age`` 0, 1, ...

    Attributes:
        name: how the table calls it.
        duration: steps that it lasts.
        at_capture: whether it begins at a step on which a capture is due.
        found_by_capture: whether the loss may never show it, so that a capture must come after it.
        detectable: whether the default rule is meant to roll back; False for what it is meant to sit through,
            and for its documented blind spots.
        heals: whether the run may recover by itself, so that settings which wait for that need not roll back.
    """

    name = "nothing"
    duration = 1
    at_capture = False
    found_by_capture = False
    detectable = True
    heals = False

    def before_forward(self, run: ChaosRun, age: int) -> None:
        """Before the forward."""

    def on_loss(self, loss: Tensor, age: int) -> Tensor:
        """The loss before its backward; what is returned is used, and told to the governor, instead."""
        return loss

    def after_backward(self, run: ChaosRun, age: int) -> None:
        """Gradients are complete and not clipped yet."""

    def after_step(self, run: ChaosRun, age: int) -> None:
        """The optimizer has stepped, the governor has not."""

    @contextmanager
    def judging(self, age: int) -> Iterator[None]:
        """Around the governor's step."""
        yield

    def sink(self, event: GovernorEvent) -> None:
        """Gets every event of the run."""

    def __repr__(self) -> str:
        return f"<fault {self.name}>"


class BadLoss(ChaosFault):
    """The loss is NaN or infinite, and with it every gradient."""

    def __init__(self, value: float = math.nan) -> None:
        self.value = value
        self.name = f"{_word(value)}-loss"

    def on_loss(self, loss: Tensor, age: int) -> Tensor:
        """The bad value, still attached to the graph."""
        return loss * self.value


class PoisonedTensor(ChaosFault):
    """One element of one gradient, parameter, optimizer moment or buffer becomes NaN or infinite.

    Args:
        place: where.
        value: NaN or an infinity.
        rng_seed: chooses tensor and element.
    """

    def __init__(self, place: Place, value: float = math.nan, rng_seed: int = 0) -> None:
        self.place, self.value, self._rng = place, value, random.Random(rng_seed)
        self.name = f"{_word(value)}-{place}"
        self.found_by_capture = place in ("moment", "buffer")

    def before_forward(self, run: ChaosRun, age: int) -> None:
        """Parameters, moments and buffers."""
        if self.place != "gradient":
            self._poison(_tensors(run, self.place))

    def after_backward(self, run: ChaosRun, age: int) -> None:
        """Gradients."""
        if self.place == "gradient":
            self._poison([p.grad for p in run.model.parameters() if p.grad is not None])

    def _poison(self, tensors: Sequence[Tensor]) -> None:
        if not tensors:
            raise ValueError(f"{self.name}: expected the run to have a floating {self.place}, it has none")
        tensor = self._rng.choice(list(tensors))
        with torch.no_grad():
            index = torch.unravel_index(
                torch.tensor(self._rng.randrange(tensor.numel()), device="cpu"), tensor.shape
            )
            tensor[tuple(index)] = self.value


class Spike(ChaosFault):
    """The loss is ``factor`` times itself; once is an anomaly to sit through, twice in a row is not."""

    def __init__(self, duration: int = 3, factor: float = 1000.0) -> None:
        self.duration, self.factor = duration, factor
        self.detectable = duration >= 2
        self.heals = True
        self.name = "spike" if duration > 1 else "single-spike"

    def on_loss(self, loss: Tensor, age: int) -> Tensor:
        """A large loss with large gradients."""
        return (loss + 1.0) * self.factor


class Ramp(ChaosFault):
    """The gradient's sign is flipped: the loss creeps upwards, a little each step."""

    name = "ramp"
    detectable = False

    def __init__(self, duration: int = 40) -> None:
        self.duration = duration

    def after_backward(self, run: ChaosRun, age: int) -> None:
        """Uphill."""
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad.neg_()


class Collapse(ChaosFault):
    """The last linear layer is zeroed: every class is as likely as any other."""

    name = "collapse"
    heals = True

    def before_forward(self, run: ChaosRun, age: int) -> None:
        """Forget."""
        layers = [m for m in run.model.modules() if isinstance(m, nn.Linear)]
        if not layers:
            raise ValueError("collapse: expected the model to have an nn.Linear, it has none")
        with torch.no_grad():
            for parameter in layers[-1].parameters():
                parameter.zero_()


class LargeBuffer(ChaosFault):
    """A buffer, such as a running mean, is ``factor`` times itself and one more: the loss does not show it.

    The default settings promote nothing while it lasts, and tell; ``suspicious_state="rollback"`` goes back.
    """

    name = "large-buffer"
    found_by_capture = True
    detectable = False

    def __init__(self, factor: float = 1e6) -> None:
        self.factor = factor

    def before_forward(self, run: ChaosRun, age: int) -> None:
        """As one batch of inputs that nobody scaled leaves it."""
        buffers = _tensors(run, "buffer")
        if not buffers:
            raise ValueError(f"{self.name}: expected the run to have a floating buffer, it has none")
        with torch.no_grad():
            buffers[0].add_(1.0).mul_(self.factor)


class PoisonedCapture(ChaosFault):
    """A parameter turns NaN between the optimizer's step and a capture, behind a loss that was healthy."""

    name = "poisoned-capture"
    at_capture = True

    def after_step(self, run: ChaosRun, age: int) -> None:
        """Poison what is about to be captured."""
        with torch.no_grad():
            next(iter(run.model.parameters())).view(-1)[0] = math.nan


class InterruptedCapture(ChaosFault):
    """A capture dies half way; the loop goes on, and a NaN follows before the next capture.

    The half-written slot must not be what is restored.
    """

    name = "interrupted-capture"
    at_capture = True
    duration = 5

    @contextmanager
    def judging(self, age: int) -> Iterator[None]:
        """Let the second part of the capture fail."""
        if age > 0:
            yield
            return
        whole = ops.snapshot_capture_

        def broken(state: Tensor, column: int, table: object, part: int, *rest: object) -> None:
            if part == 1:
                raise CaptureInterruptedError("the capture was interrupted, on purpose")
            whole(state, column, table, part, *rest)  # type: ignore[arg-type]

        ops.snapshot_capture_ = broken  # type: ignore[assignment]
        try:
            yield
        finally:
            ops.snapshot_capture_ = whole

    def on_loss(self, loss: Tensor, age: int) -> Tensor:
        """A few steps later the run breaks."""
        return loss * math.nan if age == self.duration - 1 else loss


class RaisingSink(ChaosFault):
    """A telemetry sink raises at every event, and the loss is NaN."""

    name = "raising-sink"

    def on_loss(self, loss: Tensor, age: int) -> Tensor:
        """Something to tell."""
        return loss * math.nan

    def sink(self, event: GovernorEvent) -> None:
        """Never works."""
        raise RuntimeError("this sink is broken, on purpose")


class StructureChange(ChaosFault):
    """Model and optimizer gain a parameter between captures, and a NaN follows."""

    name = "structure-change"
    duration = 5

    def before_forward(self, run: ChaosRun, age: int) -> None:
        """Grow."""
        if age == 0:
            device = next(iter(run.model.parameters())).device
            grown = nn.Parameter(torch.ones(7, device=device))
            run.model.register_parameter("chaos_growth", grown)
            run.optimizer.add_param_group({"params": [grown]})
            self._grown = grown

    def on_loss(self, loss: Tensor, age: int) -> Tensor:
        """The new parameter takes part; at the end the run breaks."""
        loss = loss + 0.0 * self._grown.square().sum()
        return loss * math.nan if age == self.duration - 1 else loss


def _word(value: float) -> str:
    return "nan" if math.isnan(value) else "inf"


def _tensors(run: ChaosRun, place: Place) -> list[Tensor]:
    if place == "parameter":
        found: list[Tensor] = list(run.model.parameters())
    elif place == "buffer":
        found = [b for b in run.model.buffers() if b.dim() > 0]
    else:
        found = [
            v for s in run.optimizer.state.values() for v in s.values() if isinstance(v, Tensor) and v.dim()
        ]
    return [t for t in found if t.is_floating_point() and t.numel()]


_PLACES: tuple[Place, ...] = ("gradient", "parameter", "moment", "buffer")


def _catalogue() -> dict[str, Callable[[], ChaosFault]]:
    made: list[Callable[[], ChaosFault]] = []
    for value in (math.nan, math.inf):
        made.append(lambda value=value: BadLoss(value))  # type: ignore[misc]
        made.extend(lambda p=place, v=value: PoisonedTensor(p, v) for place in _PLACES)  # type: ignore[misc]
    made += [lambda: Spike(1), Spike, Ramp, Collapse, LargeBuffer]
    made += [PoisonedCapture, InterruptedCapture, RaisingSink, StructureChange]
    return {make().name: make for make in made}


def list_chaos_faults() -> list[str]:
    """Names that :func:`chosen_faults` knows, in the table's order."""
    return list(_catalogue())


def chosen_faults(names: Sequence[str] | None = None) -> list[ChaosFault]:
    """Faults by name, fresh; all of them if None.

    Raises:
        ValueError: an unknown name; the message lists those there are.
    """
    catalogue = _catalogue()
    for name in names or ():
        if name not in catalogue:
            close = difflib.get_close_matches(name, catalogue, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"faults: expected some of {', '.join(catalogue)}, got {name!r}{hint}")
    return [catalogue[name]() for name in (catalogue if names is None else names)]


def random_faults(count: int, *, rng_seed: int = 0) -> list[ChaosFault]:
    """NaN or infinity in ``count`` random places: the loss, or an element of any tensor.

    Raises:
        ValueError: ``count`` is below 1.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count: expected an integer >= 1, got {count!r}")
    rng = random.Random(rng_seed)
    faults: list[ChaosFault] = []
    for number in range(count):
        value, choice = rng.choice((math.nan, math.inf)), rng.randrange(len(_PLACES) + 1)
        fault: ChaosFault = BadLoss(value)
        if choice < len(_PLACES):
            fault = PoisonedTensor(_PLACES[choice], value, rng.randrange(2**31))
        fault.name = f"{fault.name} #{number + 1}"
        faults.append(fault)
    return faults

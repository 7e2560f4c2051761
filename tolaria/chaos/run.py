"""Breaking a training run, and what came of it."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tolaria.chaos.faults import CaptureInterruptedError, ChaosFault
from tolaria.chaos.target import ChaosRun
from tolaria.data import SkipBatches
from tolaria.governor import CaptureEvent, GovernorConfig, RollbackEvent, TolariaGovernor, VerdictEvent
from tolaria.nn.nest import to_device
from tolaria.nn.randomness import preserve_random_state
from tolaria.tasks import TaskSpec, create_model, get_task
from tolaria.train import validate_and_get_metrics
from tolaria.train.batch import call_model, for_criterion, split_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a fault did to a run."""

    fault: str
    """Its name; ``"nothing"`` for the undisturbed run."""
    start: int
    """The step at which it began, from 1."""
    rollbacks: int
    """How often the governor rolled back."""
    reason: str | None
    """Why, the first time; ``"ANOMALY (tolerated)"`` for a verdict without rollback; None: unnoticed."""
    detected_after: int | None
    """Steps from the fault to the first verdict against it; 0 is the same step."""
    steps_lost: int
    """Steps of training undone."""
    bit_exact: bool | None
    """Whether every restore gave back the captured state byte for byte; None if there was none."""
    is_finite: bool
    """Whether the state is finite at the end."""
    score: float
    """The final score."""
    detectable: bool = True
    """Whether a rollback was to be expected."""

    @property
    def is_caught(self) -> bool:
        """Whether the governor rolled back."""
        return self.rollbacks > 0

    @property
    def is_as_promised(self) -> bool:
        """Finite at the end, every restore exact, and rolled back where that is promised."""
        return self.is_finite and self.bit_exact is not False and (self.is_caught or not self.detectable)


def execute(run: ChaosRun, fault: ChaosFault | None = None, *, steps: int, start: int = 0) -> Outcome:
    """Train ``run`` for ``steps`` steps under a governor, with ``fault`` from step ``start`` on.

    The loop is the plain one of any training script; nothing in it knows what the governor will do.

    Args:
        run: used up by this.
        fault: what goes wrong; None: nothing.
        steps: optimizer steps.
        start: first step of the fault, from 1; moved to the next capture for faults that want one.

    Raises:
        ValueError: the fault does not fit into the run.
    """
    if steps < 1:
        raise ValueError(f"steps: expected an integer >= 1, got {steps!r}")
    if fault is not None:
        start = checked_start(fault, steps, run.config.snapshot_interval, start)
    sinks = [] if fault is None else [fault.sink]
    governor = TolariaGovernor(
        run.model, run.optimizer, config=run.config, random_guess_loss=run.random_guess_loss, sinks=sinks
    )
    watch = _Watch(run, start)
    batches = SkipBatches(_forever(run.batches), governor)
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        age = step - start
        active = fault if fault is not None and 0 <= age < fault.duration else None
        loss = _train_step(run, batch, active, age)
        try:
            with active.judging(age) if active is not None else nullcontext():
                governor.step(loss)
        except CaptureInterruptedError:
            pass  # as a loop would that catches what it does not know and goes on
        watch.look(governor)
    governor.close()
    return watch.outcome(fault)


def latest_start(fault: ChaosFault, steps: int, interval: int) -> int:
    """The last step at which ``fault`` can begin in a run of ``steps`` steps, captured each ``interval``.

    Raises:
        ValueError: there is none; the message says how many steps it takes.
    """
    last = steps - fault.duration + 1
    if fault.at_capture or fault.found_by_capture:
        last -= last % interval
    if last < 1:
        least, lasts = fault.duration, f"{fault.name} lasts {fault.duration}"
        if fault.at_capture or fault.found_by_capture:
            least += interval - 1
            how = "begins at" if fault.at_capture else "is found by"
            lasts += f" and {how} a capture (every {interval} steps)"
        raise ValueError(f"steps: expected at least {least}, since {lasts}, got {steps}")
    return last


def checked_start(fault: ChaosFault, steps: int, interval: int, start: int) -> int:
    """``start``, moved to the next capture for faults that want one.

    Raises:
        ValueError: the fault does not fit into the run.
    """
    last = latest_start(fault, steps, interval)
    if not 1 <= start <= last:
        found = f" and is found by a capture (every {interval} steps)" if fault.found_by_capture else ""
        raise ValueError(
            f"start: expected a start from 1 to {last}, since {fault.name} lasts {fault.duration} of {steps} "
            f"steps{found}, got {start}"
        )
    return -(-start // interval) * interval if fault.at_capture else start


def _forever(batches: Iterable[object]) -> Iterator[object]:
    return itertools.chain.from_iterable(itertools.repeat(batches))


def _train_step(run: ChaosRun, batch: object, fault: ChaosFault | None, age: int) -> Tensor:
    device = next(iter(run.model.parameters())).device
    inputs, targets = split_batch(batch)
    inputs, targets = to_device(inputs, device), to_device(targets, device)
    if fault is not None:
        fault.before_forward(run, age)
    run.model.train()
    loss = run.criterion(*for_criterion(call_model(run.model, inputs), targets, run.task_type))
    if fault is not None:
        loss = fault.on_loss(loss, age)
    run.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    if fault is not None:
        fault.after_backward(run, age)
    if run.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(run.model.parameters(), run.max_grad_norm)
    run.optimizer.step()
    if fault is not None:
        fault.after_step(run, age)
    return loss.detach()


class _Watch:
    """Keeps a copy of its own of every captured state, to compare with what is restored."""

    def __init__(self, run: ChaosRun, start: int) -> None:
        self.run, self.start = run, start
        self.copies = {1: _fingerprint(run)}  # the capture at attach
        self.reason: str | None = None
        self.detected: int | None = None
        self.rollbacks, self.lost = 0, 0
        self.exact: bool | None = None

    def look(self, governor: TolariaGovernor) -> None:
        """Read what the governor said about this step."""
        for event in governor.poll():
            if isinstance(event, CaptureEvent):
                self.copies[event.capture_id] = _fingerprint(self.run)
            elif isinstance(event, VerdictEvent):
                self._noticed(event.step, event.reason.name + ("" if event.rollback else " (tolerated)"))
            elif isinstance(event, RollbackEvent):
                report = event.report
                self.rollbacks += 1
                self.lost += report.steps_lost
                self._noticed(report.step, report.reason.name)
                same = _contains(_fingerprint(self.run), self.copies[report.restored_capture])
                self.exact = same and self.exact is not False

    def _noticed(self, step: int, reason: str) -> None:
        if self.detected is None:
            self.detected = step - self.start
        if self.reason is None or (
            self.reason.endswith("(tolerated)") and not reason.endswith("(tolerated)")
        ):
            self.reason = reason

    def outcome(self, fault: ChaosFault | None) -> Outcome:
        """What came of it."""
        tensors = [*self.run.model.parameters(), *self.run.model.buffers()]
        waits = self.run.config.shift_horizon > 0
        return Outcome(
            fault="nothing" if fault is None else fault.name,
            start=self.start,
            rollbacks=self.rollbacks,
            reason=self.reason,
            detected_after=self.detected,
            steps_lost=self.lost,
            bit_exact=self.exact,
            is_finite=all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point()),
            score=self.run.evaluate(self.run.model),
            detectable=fault is not None and fault.detectable and not (waits and fault.heals),
        )


def _fingerprint(run: ChaosRun) -> dict[str, Any]:
    return copy.deepcopy({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()})


def _contains(live: object, kept: object) -> bool:
    """Whether everything in ``kept`` is in ``live``, tensors byte for byte (a NaN equals itself)."""
    if isinstance(kept, Tensor):
        if not isinstance(live, Tensor) or live.dtype != kept.dtype or live.shape != kept.shape:
            return False
        raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (live, kept)]
        return torch.equal(*raw)
    if isinstance(kept, dict):
        return isinstance(live, dict) and all(k in live and _contains(live[k], v) for k, v in kept.items())
    if isinstance(kept, list | tuple):
        return (
            isinstance(live, list | tuple)
            and len(live) >= len(kept)  # a group that was added since stays
            and all(_contains(a, b) for a, b in zip(live, kept, strict=False))
        )
    return live == kept or (isinstance(kept, float) and isinstance(live, float) and math.isnan(kept))


def task_run(
    task: str | TaskSpec = "digits",
    *,
    device: str | torch.device = "cpu",
    rng_seed: int = 0,
    config: GovernorConfig | None = None,
    data_dir: Path | None = None,
) -> ChaosRun:
    """A run of a task's host, fresh: same seed, same weights and batches.

    Args:
        task: a registered name or a TaskSpec.
        device: where to train.
        rng_seed: seeds weights and data order.
        config: the governor's settings; a capture every 50 steps if None.
        data_dir: where a task that needs files finds them; an error for one that needs none.
    """
    spec = task if isinstance(task, TaskSpec) else get_task(task)
    settings = spec.defaults
    spec.check_data_dir(data_dir)
    model = create_model(spec, device, rng_seed=rng_seed)
    data = spec.load_data(batch_size=settings.batch_size, rng_seed=rng_seed, data_dir=data_dir)
    criterion = spec.criterion()

    def accuracy(trained: nn.Module) -> float:
        return validate_and_get_metrics(
            trained, (), data.test, criterion, device, task_type=spec.task_type, train_batches=0
        ).val_accuracy

    with preserve_random_state():
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    return ChaosRun(
        model, optimizer, data.train, criterion, accuracy, spec.guess_loss, spec.task_type,
        settings.max_grad_norm, config if config is not None else GovernorConfig(snapshot_interval=50),
    )  # fmt: skip

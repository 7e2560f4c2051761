"""The three training loops: without a seed, with an incubating seed, with a seed that is blended in."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tolaria.data.skip_batches import HasBatchLedger, SkipBatches
from tolaria.governor.batches import BatchLedger
from tolaria.nn.device import validate_device
from tolaria.nn.schedule import AlphaSchedule
from tolaria.nn.slot import SeedSlot
from tolaria.nn.stage import SeedStage
from tolaria.tasks.spec import TaskType
from tolaria.train import arguments
from tolaria.train.learner import Learner
from tolaria.train.step import Criterion, GovernorLike, StepHooks, StepPlan, StepResult, train_step
from tolaria.train.weights import is_summed


@dataclass(frozen=True, slots=True)
class EpochStats:
    """What an epoch did. Tensors stay on the device until somebody reads them."""

    losses: Tensor
    """(steps,): the loss of each step, the mean over its labels that are not ignored."""
    mean_loss: Tensor
    """0-dim float64: mean over the epoch, weighted by sample (by label that is not ignored where there are
    several for a sample), as :func:`validate_and_get_metrics` has it; NaN if there was none."""
    steps: int
    """Optimizer steps."""
    samples: int
    """Samples seen."""
    accuracy: Tensor
    """0-dim float64: percent of the labels guessed right, each before the step that learnt from it; NaN where
    the labels are no classes, or there was none."""

    @classmethod
    def of(cls, steps: Sequence[StepResult], device: torch.device, *, summed: bool = False) -> EpochStats:
        """Gather the steps of an epoch.

        Args:
            steps: what each saw.
            device: where figures of no step go.
            summed: the losses are sums over the labels, no means.
        """
        nothing = torch.full((), float("nan"), dtype=torch.float64, device=device)
        if not steps:
            return cls(torch.empty(0, device=device), nothing, 0, 0, nothing)
        losses = torch.stack([step.loss for step in steps]).detach()
        counts = torch.stack([step.count for step in steps])
        sums = losses.double() if summed else torch.where(counts > 0, losses.double() * counts, 0.0)
        hits = [step.correct for step in steps if step.correct is not None]
        is_complete = len(hits) == len(steps)
        accuracy = 100.0 * torch.stack(hits).sum() / counts.sum() if is_complete else nothing
        mean = sums.sum() / counts.sum()
        return cls(losses, mean, len(steps), sum(step.rows for step in steps), accuracy)


def train_epoch_normal(
    model: nn.Module,
    trainloader: Iterable[object],
    criterion: Criterion,
    optimizer: Optimizer,
    device: str | torch.device,
    task_type: TaskType = "classification",
    *,
    governor: GovernorLike | None = None,
    accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    amp_dtype: torch.dtype | None = None,
    scaler: GradScaler | None = None,
    schedulers: Sequence[LRScheduler] = (),
    max_steps: int | None = None,
    hooks: StepHooks | None = None,
) -> EpochStats:
    """Train for one pass over ``trainloader`` with no seed in play. Never waits for the device.

    Args:
        model: inputs to logits; put into train mode.
        trainloader: any iterable of ``(inputs, targets)``; a DataLoader, a list, a generator.
        criterion: logits and targets to a 0-dim mean loss.
        optimizer: over the model's parameters.
        device: where the batches go (the model is there already).
        task_type: ``"classification"``, or ``"lm"`` for logits (B, T, V) and targets (B, T).
        governor: told the loss once per optimizer step; it covers the optimizers from here on. Its
            ``config.skip_batches`` are left out after a rollback.
        accumulation_steps: batches per optimizer step; fewer at the end of the loader are a step, too.
        max_grad_norm: clip the gradient's norm to this.
        amp_dtype: run forwards under autocast with this dtype.
        scaler: a GradScaler for float16; it is updated here.
        schedulers: learning-rate schedulers, stepped once per optimizer step.
        max_steps: stop after so many optimizer steps, leaving the rest of the loader alone.
        hooks: places to look on or meddle.

    Returns:
        Losses on the device, steps and samples.

    Raises:
        ValueError: a bad option.  TypeError: a batch or a scheduler of the wrong kind.
    """
    plan = _plan(
        model, criterion, device, task_type, amp_dtype, schedulers, governor, hooks,
        host=Learner(optimizer, max_grad_norm, scaler),
    )  # fmt: skip
    return _run_epoch(plan, trainloader, accumulation_steps, max_steps)


def train_epoch_incubator_mode(
    model: nn.Module,
    trainloader: Iterable[object],
    criterion: Criterion,
    host_optimizer: Optimizer,
    seed_optimizer: Optimizer | Sequence[Optimizer],
    device: str | torch.device,
    task_type: TaskType = "classification",
    *,
    governor: GovernorLike | None = None,
    accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    seed_max_grad_norm: float | None = None,
    amp_dtype: torch.dtype | None = None,
    scaler: GradScaler | None = None,
    schedulers: Sequence[LRScheduler] = (),
    max_steps: int | None = None,
    hooks: StepHooks | None = None,
) -> EpochStats:
    """Train the host as if alone while a seed in stage TRAINING learns beside it. Never waits for the device.

    The host's trajectory is bit for bit that of :func:`train_epoch_normal` without the seed; the seed's
    gradient is what plain autograd would give its output. Not covered: criteria or optimizers that couple
    host and seed parameters (a weight penalty inside the criterion, one optimizer over both).

    Args:
        model: as in :func:`train_epoch_normal`; if it is a MorphogeneticModel, at least one slot must be in
            TRAINING.
        trainloader: as in :func:`train_epoch_normal`.
        criterion: as in :func:`train_epoch_normal`.
        host_optimizer: over the host's parameters.
        seed_optimizer: over the seed's parameters; of several seeds one over all, or one for each. Seeds do
            not touch each other either way, as long as the optimizer itself couples no parameters; with a
            ``scaler``, one over several seeds reads the device once a step.
        device: as in :func:`train_epoch_normal`.
        task_type: as in :func:`train_epoch_normal`.
        governor: as in :func:`train_epoch_normal`.
        accumulation_steps: as in :func:`train_epoch_normal`.
        max_grad_norm: clip the norm over the host optimizer's parameters.
        seed_max_grad_norm: clip the norm over the parameters of each seed.
        amp_dtype: as in :func:`train_epoch_normal`.
        scaler: the host's; the seed is unscaled by the same scale but its overflows only skip its own step.
        schedulers: of either optimizer.
        max_steps: as in :func:`train_epoch_normal`.
        hooks: as in :func:`train_epoch_normal`.

    Returns:
        Losses on the device, steps and samples.

    Raises:
        ValueError: no slot is in TRAINING, a parameter is in both optimizers, or a bad option.
        TypeError: a batch or a scheduler of the wrong kind.
    """
    optimizers = [seed_optimizer] if seed_optimizer is None else _listed(seed_optimizer)
    if not optimizers:
        raise ValueError("seed_optimizer: expected a torch optimizer, or one for each seed, got none")
    _check_apart(host_optimizer, optimizers)
    slots = [module for module in model.modules() if isinstance(module, SeedSlot)]
    if slots and not any(slot.stage is SeedStage.TRAINING for slot in slots):
        stages = ", ".join(f"{slot.name}: {slot.stage.name}" for slot in slots)
        raise ValueError(
            f"train_epoch_incubator_mode: expected a slot in stage TRAINING, got {stages}; "
            "call model.germinate(slot, blueprint) and model.incubate(slot)"
        )
    plan = _plan(
        model, criterion, device, task_type, amp_dtype, schedulers, governor, hooks,
        host=Learner(host_optimizer, max_grad_norm, scaler),
        seeds=_seed_learners(optimizers, seed_max_grad_norm, scaler, device),
    )  # fmt: skip
    return _run_epoch(plan, trainloader, accumulation_steps, max_steps)


def train_epoch_blended(
    model: nn.Module,
    trainloader: Iterable[object],
    criterion: Criterion,
    host_optimizer: Optimizer,
    seed_optimizer: Optimizer | Sequence[Optimizer] | None,
    device: str | torch.device,
    task_type: TaskType = "classification",
    *,
    governor: GovernorLike | None = None,
    alpha_schedules: Sequence[AlphaSchedule] | None = None,
    accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    seed_max_grad_norm: float | None = None,
    amp_dtype: torch.dtype | None = None,
    scaler: GradScaler | None = None,
    schedulers: Sequence[LRScheduler] = (),
    max_steps: int | None = None,
    hooks: StepHooks | None = None,
) -> EpochStats:
    """Train host and seed together while alpha rises. Never waits for the device.

    Args:
        model: as in :func:`train_epoch_normal`.
        trainloader: as in :func:`train_epoch_normal`.
        criterion: as in :func:`train_epoch_normal`.
        host_optimizer: over the host's parameters, or over all of them if there is no seed optimizer.
        seed_optimizer: as in :func:`train_epoch_incubator_mode`; None if the host's optimizer has the seeds'
            parameters or they stay as they are.
        device: as in :func:`train_epoch_normal`.
        task_type: as in :func:`train_epoch_normal`.
        governor: as in :func:`train_epoch_normal`.
        alpha_schedules: stepped before each forward; the schedules of the model's BLENDING slots if None.
        accumulation_steps: as in :func:`train_epoch_normal`.
        max_grad_norm: clip the norm over the host optimizer's parameters.
        seed_max_grad_norm: clip the norm over the parameters of each seed.
        amp_dtype: as in :func:`train_epoch_normal`.
        scaler: as in :func:`train_epoch_incubator_mode`.
        schedulers: of either optimizer.
        max_steps: as in :func:`train_epoch_normal`.
        hooks: as in :func:`train_epoch_normal`.

    Returns:
        Losses on the device, steps and samples.

    Raises:
        ValueError: a parameter is in both optimizers, or a bad option.
        TypeError: a batch or a scheduler of the wrong kind.
    """
    optimizers = _listed(seed_optimizer)
    _check_apart(host_optimizer, optimizers)
    if alpha_schedules is None:
        alpha_schedules = [slot.schedule for slot in _slots_of(model) if slot.schedule is not None]
    plan = _plan(
        model, criterion, device, task_type, amp_dtype, schedulers, governor, hooks,
        host=Learner(host_optimizer, max_grad_norm, scaler),
        seeds=_seed_learners(optimizers, seed_max_grad_norm, scaler, device),
        alpha_schedules=alpha_schedules,
    )  # fmt: skip
    return _run_epoch(plan, trainloader, accumulation_steps, max_steps)


def _plan(
    model: nn.Module,
    criterion: Criterion,
    device: str | torch.device,
    task_type: TaskType,
    amp_dtype: torch.dtype | None,
    schedulers: Sequence[LRScheduler],
    governor: GovernorLike | None,
    hooks: StepHooks | None,
    *,
    host: Learner,
    seeds: Sequence[Learner] = (),
    alpha_schedules: Sequence[AlphaSchedule] = (),
) -> StepPlan:
    """Check the options that the loops share and put them together."""
    arguments.check_task_type(task_type)
    arguments.check_model_and_criterion(model, criterion)
    arguments.check_optimizer("host_optimizer" if seeds else "optimizer", host.optimizer)
    arguments.check_norm("max_grad_norm", host.max_grad_norm)
    for seed in seeds:
        arguments.check_norm("seed_max_grad_norm", seed.max_grad_norm)
    if amp_dtype not in (None, torch.float16, torch.bfloat16):
        raise ValueError(f"amp_dtype: expected torch.float16, torch.bfloat16 or None, got {amp_dtype!r}")
    arguments.check_steppers("schedulers", schedulers)
    arguments.check_steppers("alpha_schedules", alpha_schedules)
    arguments.check_calls("governor", governor, ("config", "check_vital_signs", "step"))
    arguments.check_calls("hooks", hooks, [name for name in vars(StepHooks) if not name.startswith("_")])
    arguments.check_scaler(host.scaler)
    checked = validate_device(device)
    if host.scaler is not None and not host.scaler.is_enabled():
        host.scaler = None
    host.is_host = True
    for learner in (host, *seeds):
        learner.slots = _slots_of(model)
    if governor is not None:
        _cover(governor, [learner.optimizer for learner in (host, *seeds)])
    return StepPlan(
        model, criterion, checked, task_type, host, seeds, amp_dtype, schedulers, alpha_schedules, governor,
        hooks if hooks is not None else StepHooks(),
    )  # fmt: skip


def _cover(governor: GovernorLike, optimizers: Sequence[object]) -> None:
    """Have the governor cover the optimizers that it was not told of, if it can and they are torch's."""
    add = getattr(governor, "add_optimizer", None)
    for optimizer in optimizers:
        if add is not None and isinstance(optimizer, Optimizer):
            add(optimizer)


def _slots_of(model: nn.Module) -> list[SeedSlot]:
    return [module for module in model.modules() if isinstance(module, SeedSlot)]


def _listed(optimizers: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    """The seeds' optimizers, however they were given."""
    if optimizers is None:
        return []
    return list(optimizers) if isinstance(optimizers, list | tuple) else [optimizers]  # type: ignore[list-item]


def _seed_learners(
    optimizers: Sequence[Optimizer],
    max_norm: float | None,
    scaler: GradScaler | None,
    device: str | torch.device,
) -> list[Learner]:
    arguments.check_scaler(scaler)
    if scaler is None or not scaler.is_enabled():
        return [Learner(optimizer, max_norm) for optimizer in optimizers]
    kind = validate_device(device).type
    return [Learner(optimizer, max_norm, GradScaler(kind, init_scale=1.0)) for optimizer in optimizers]


def _check_apart(host: Optimizer, seeds: Sequence[Optimizer]) -> None:
    if not seeds:
        return  # the host's is checked with the other arguments
    arguments.check_optimizer("host_optimizer", host)
    of_host, of_seeds = _parameters_of(host), set[int]()
    for optimizer in seeds:
        arguments.check_optimizer("seed_optimizer", optimizer)
        own = _parameters_of(optimizer)
        for taken, by in ((of_host, "host_optimizer does"), (of_seeds, "other seeds' optimizers do")):
            if own & taken:
                raise ValueError(
                    f"seed_optimizer: expected parameters that {by} not have, "
                    f"got {len(own & taken)} that are in both; "
                    "use model.host_parameters() and model.seed_parameters()"
                )
        of_seeds |= own


def _parameters_of(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _left_out_after_rollbacks(loader: Iterable[object], governor: object) -> Iterable[object]:
    """The loader, without what a governor that can say so wants left out of it."""
    ledger = getattr(governor, "batch_ledger", None)
    if not isinstance(ledger, BatchLedger) or not ledger.size:
        return loader
    return SkipBatches(loader, cast(HasBatchLedger, governor))


def _run_epoch(
    plan: StepPlan, trainloader: Iterable[object], accumulation_steps: int, max_steps: int | None
) -> EpochStats:
    arguments.check_loader("trainloader", trainloader)
    arguments.check_count("accumulation_steps", accumulation_steps, 1)
    arguments.check_count("max_steps", max_steps, 1, optional=True)
    plan.model.train()
    steps: list[StepResult] = []
    batches = iter(_left_out_after_rollbacks(trainloader, plan.governor))
    while max_steps is None or len(steps) < max_steps:
        micro_batches = list(itertools.islice(batches, accumulation_steps))
        if not micro_batches:
            break
        steps.append(train_step(plan, micro_batches))
    return EpochStats.of(steps, plan.device, summed=is_summed(plan.criterion))

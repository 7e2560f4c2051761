"""What each seed is worth: the loss with it and without it, for every slot in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tolaria.nn.device import validate_device
from tolaria.nn.nest import to_device
from tolaria.nn.randomness import preserve_random_state
from tolaria.nn.slot import SeedSlot
from tolaria.nn.stage import SeedStage
from tolaria.tasks.spec import TaskType
from tolaria.train import arguments
from tolaria.train.batch import call_model, split_batch
from tolaria.train.loaders import undisturbed
from tolaria.train.samples import Gain, by_sample, compare
from tolaria.train.step import Criterion
from tolaria.train.validate import eval_mode, own_generators

_COUNT = (SeedStage.BLENDING, SeedStage.FOSSILIZED)


def seed_contributions(
    model: nn.Module,
    loader: Iterable[object],
    criterion: Criterion | None = None,
    device: str | torch.device = "cpu",
    task_type: TaskType = "classification",
    *,
    amp_dtype: torch.dtype | None = None,
) -> dict[str, Gain]:
    """By how much the loss is lower with each seed than without it, the others staying (leave one out).

    Of every batch one copy for each seed that counts, and one more, go through side by side: in each another
    seed is bypassed. Modes, random streams and an epoch that is under way are left as found.

    This is no answer to whether a seed earned its place: a host that has grown around a useless one needs it.
    That takes the host alone as a control, as :func:`tolaria.train.grow` has it.

    Args:
        model: with slots; in eval mode its samples must not depend on each other.
        loader: batches held out of training.
        criterion: logits and targets to a loss; cross entropy if None.
        device: where the batches go.
        task_type: as for :func:`validate_and_get_metrics`.
        amp_dtype: autocast dtype, or None.

    Returns:
        For each slot with a BLENDING or FOSSILIZED seed the gain, with its standard error over samples.

    Raises:
        ValueError: a bad option, or features at a slot whose first dimension is not the batch.
        TypeError: an argument or a batch of the wrong kind.
    """
    criterion = nn.CrossEntropyLoss() if criterion is None else criterion
    arguments.check_task_type(task_type)
    arguments.check_model_and_criterion(model, criterion)
    arguments.check_loader("loader", loader)
    where = validate_device(device)
    slots = [
        m for m in model.modules() if isinstance(m, SeedSlot) and m.stage in _COUNT and m.seed is not None
    ]
    if not slots:
        return {}
    sums: list[list[Tensor]] = [[] for _ in range(len(slots) + 1)]
    counts: list[Tensor] = []
    autocast = torch.autocast(where.type, dtype=amp_dtype) if amp_dtype is not None else nullcontext()
    with (
        preserve_random_state(*own_generators(loader)),
        eval_mode(model),
        torch.no_grad(),
        autocast,
        undisturbed(loader) as batches,
    ):
        for batch in batches:
            inputs, targets = split_batch(batch)
            inputs, targets = to_device(inputs, where), to_device(targets, where)
            logits = _side_by_side(model, slots, inputs, targets)
            for index, part in enumerate(logits.chunk(len(slots) + 1)):
                found, count = by_sample(part, targets, criterion, task_type)
                sums[index].append(found)
            counts.append(count)
    if not counts:
        nothing = torch.empty(0, dtype=torch.float64)
        return {slot.name: compare(nothing, nothing, nothing) for slot in slots}
    whole, labels = torch.cat(sums[0]), torch.cat(counts)
    return {
        slot.name: compare(whole, torch.cat(without), labels)
        for slot, without in zip(slots, sums[1:], strict=True)
    }


def _side_by_side(model: nn.Module, slots: list[SeedSlot], inputs: Any, targets: Tensor) -> Tensor:  # noqa: ANN401
    """Logits ((slots + 1) * B, ...): with every seed, then without each in turn."""
    rows, parts = targets.shape[0], len(slots) + 1
    with ExitStack() as stack:
        for index, slot in enumerate(slots, start=1):
            shares = torch.ones(parts, rows, dtype=torch.float32, device=slot.alpha.device)
            shares[index] = 0.0
            stack.enter_context(slot.shared(shares.flatten()))
        return call_model(model, _repeated(inputs, rows, parts))


def _repeated(value: Any, rows: int, times: int) -> Any:  # noqa: ANN401  (any nest of tensors)
    """Every tensor that is a batch, so many times one after another."""
    if isinstance(value, Tensor):
        is_batch = value.dim() > 0 and value.shape[0] == rows
        return value.repeat(times, *[1] * (value.dim() - 1)) if is_batch else value
    if isinstance(value, dict):
        return {name: _repeated(each, rows, times) for name, each in value.items()}
    if isinstance(value, tuple | list):
        made = [_repeated(each, rows, times) for each in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return value

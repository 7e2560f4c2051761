"""A control: the host as it would have been without the seed, trained beside it on the same batches."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from tolaria.nn.model import MorphogeneticModel
from tolaria.nn.randomness import preserve_random_state
from tolaria.train.learner import Learner
from tolaria.train.samples import Gain, compare, losses_by_sample
from tolaria.train.step import Criterion, StepPlan, train_step

if TYPE_CHECKING:
    from tolaria.tasks.spec import TaskSpec
    from tolaria.train.trained import Trained


class Control:
    """A twin of the host, from where a seed begins to be blended in.

    Until then the host alone and the host beside an incubating seed are the same, bit for bit; from then on
    the twin takes a step on the batches of each step, with the same random numbers, so that it is the host
    alone for as many steps. No governor watches it, and nobody breaks it on purpose.

    Args:
        trained: what is trained, the host's optimizer and schedule included.
        criterion: logits and targets to a loss.
        spec: the task.
        amp_dtype: autocast dtype, or None.
    """

    def __init__(
        self, trained: Trained, criterion: Criterion, spec: TaskSpec, amp_dtype: torch.dtype | None
    ) -> None:
        self.model: MorphogeneticModel = copy.deepcopy(trained.model)
        self.model.zero_grad(set_to_none=True)
        for slot in self.model.slots.values():
            if slot.name == trained.slot.name:
                slot.clear()
        self.optimizer, self._scheduler = trained.twin_of_host(self.model)
        scaler = None
        if trained.scaler is not None:
            scaler = GradScaler(trained.device.type)
            scaler.load_state_dict(trained.scaler.state_dict())
        self._plan = StepPlan(
            self.model, criterion, trained.device, spec.task_type,
            Learner(self.optimizer, trained.settings.max_grad_norm, scaler, is_host=True),
            amp_dtype=amp_dtype, schedulers=[self._scheduler],
        )  # fmt: skip

    def step(self, micro_batches: Sequence[object]) -> None:
        """Take the step that is about to be taken beside; the random streams are left as found."""
        self.model.train()
        with preserve_random_state():
            train_step(self._plan, micro_batches)

    def gain_of(self, model: nn.Module, loader: Iterable[object]) -> Gain:
        """By how much the loss of ``model`` is below the control's, paired by sample of ``loader``."""
        plan = self._plan
        (losses, counts), (others, _) = (
            losses_by_sample(
                each, loader, plan.criterion, plan.device, plan.task_type, amp_dtype=plan.amp_dtype
            )
            for each in (model, self.model)
        )
        return compare(losses, others, counts)

    def state(self) -> dict[str, Tensor]:
        """What it consists of, as uint8 tensors that may share its memory, for :meth:`load`."""
        return {name: _bytes(tensor) for name, tensor in self._tensors().items()}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` said.

        Raises:
            ValueError: it is that of another network.
        """
        mine = self._tensors()
        if set(mine) != set(saved):
            raise ValueError(f"control: expected {len(mine)} tensors, got {len(saved)} others")
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(saved[name].view(tensor.dtype).view(tensor.shape))

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for i, parameter in enumerate(self.model.host_parameters()):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{i}.{key}"] = value
        return found


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

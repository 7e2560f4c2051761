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

_BLOCK = 10


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
        window: how many of the latest steps are evidence.
    """

    def __init__(
        self,
        trained: Trained,
        criterion: Criterion,
        spec: TaskSpec,
        amp_dtype: torch.dtype | None,
        *,
        window: int,
    ) -> None:
        self._losses = torch.zeros(2, max(window, 1), dtype=torch.float64, device=trained.device)
        self._taken = torch.zeros((), dtype=torch.int64, device=trained.device)
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
            self._loss = train_step(self._plan, micro_batches).loss

    def note(self, loss: Tensor) -> None:
        """A step beside it had this loss, on the same batches, before it learnt from them."""
        place = self._taken % self._losses.shape[1]
        self._losses.index_copy_(1, place.view(1), torch.stack([loss, self._loss]).double().view(2, 1))
        self._taken.add_(1)

    def gain_in_training(self) -> Gain:
        """By how much the training loss was below the control's, paired by batch, over the latest steps.

        Neighbouring steps are alike: the error is that of the means of blocks of ten (of fewer, if there are
        few steps).
        """
        steps = min(int(self._taken), self._losses.shape[1])  # sync: the verdict is wanted
        at = (int(self._taken) + torch.arange(-steps, 0, device=self._losses.device)) % self._losses.shape[1]
        latest = self._losses[:, at]
        latest = latest[:, torch.isfinite(latest).all(dim=0)]
        block = max(1, min(_BLOCK, latest.shape[1] // 4))
        whole = latest[:, : latest.shape[1] // block * block].view(2, -1, block).mean(dim=2)
        return compare(whole[0], whole[1], torch.ones_like(whole[0]))

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

    def give_back(self, trained: Trained) -> None:
        """Have the host go on as if the seed, which is gone, had never been blended in: in place."""
        trained.model.load_state_dict(self.model.state_dict())
        pairs = zip(trained.model.host_parameters(), self.model.host_parameters(), strict=True)
        with torch.no_grad():
            for parameter, twin in pairs:
                for key, value in self.optimizer.state.get(twin, {}).items():
                    trained.host_optimizer.state[parameter][key].copy_(value)

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
        found |= {"losses": self._losses, "taken": self._taken}
        for i, parameter in enumerate(self.model.host_parameters()):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{i}.{key}"] = value
        return found


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

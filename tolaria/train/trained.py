"""What a story trains and by what: model, optimizers, schedules, scaler, data, governor; on disk, too."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tolaria.errors import SnapshotError
from tolaria.nn.model import MorphogeneticModel
from tolaria.nn.slot import SeedSlot
from tolaria.snapshot.rng import Generators
from tolaria.snapshot.snapshot import Snapshot
from tolaria.tasks.data import TaskData
from tolaria.tasks.spec import TaskSpec, TrainSettings
from tolaria.train.bookmark import EXTRA, Bookmark, Bookmarker, load_seed
from tolaria.train.stream import BatchStream

if TYPE_CHECKING:
    from tolaria.governor import GovernorConfig, GovernorEvent, Preset, TolariaGovernor

_LR_FLOOR = 0.01  # the cosine ends at this share of the peak


def governor_config_for(task: TaskSpec, *, preset: Preset = "default", **changes: Any) -> GovernorConfig:  # noqa: ANN401
    """The governor's settings for a task.

    Args:
        task: whose random-guess loss counts.
        preset: where to start from, see :meth:`GovernorConfig.preset`.
        **changes: fields that are to differ.

    Raises:
        ConfigError: a field is out of range, or there is no such preset.  TypeError: there is no such field.
    """
    from tolaria.governor import GovernorConfig

    # Chance has two faces where classes are not equally likely: the frequencies, and the uniform guess above.
    if task.guess_loss < 0.95 * math.log(task.num_classes):
        changes.setdefault("lobotomy_band", (0.95, math.inf))
    return GovernorConfig.preset(preset, **changes)


class Trained:
    """The objects that steps change; a saved state puts all of them back.

    Args:
        model: the network, on ``device``.
        slot: where to graft.
        settings: how to train.
        data: what to train on.
        device: where to train.
        amp_dtype: autocast dtype, or None.
    """

    def __init__(
        self,
        model: MorphogeneticModel,
        slot: SeedSlot,
        settings: TrainSettings,
        data: TaskData,
        device: torch.device,
        amp_dtype: torch.dtype | None,
    ) -> None:
        self.model, self.slot, self.settings, self.device = model, slot, settings, device
        self.host_optimizer = AdamW(
            model.host_parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.host_scheduler = self._scheduler(self.host_optimizer, start=0)
        self.seed_optimizer: Optimizer | None = None
        self.seed_scheduler: LambdaLR | None = None
        self.scaler = GradScaler("cuda") if amp_dtype is torch.float16 and device.type == "cuda" else None
        self.governor: TolariaGovernor | None = None
        self.stream = BatchStream(data.train)

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those of now: the host's, then the seed's."""
        return [o for o in (self.host_optimizer, self.seed_optimizer) if o is not None]

    @property
    def schedulers(self) -> list[LambdaLR]:
        """Those of now, in the same order."""
        return [s for s in (self.host_scheduler, self.seed_scheduler) if s is not None]

    def attach_governor(
        self,
        task: TaskSpec,
        config: GovernorConfig | None,
        sinks: Sequence[Callable[[GovernorEvent], object]],
        bookmarker: Bookmarker,
    ) -> None:
        """Put a governor over all of it; a capture holds the place in the story, too."""
        from tolaria.governor import TolariaGovernor

        self.governor = TolariaGovernor(
            self.model,
            self.optimizers,
            config=config if config is not None else governor_config_for(task),
            random_guess_loss=task.guess_loss,
            schedulers=self.schedulers,
            scaler=self.scaler,
            extras={EXTRA: bookmarker},
            sinks=list(sinks),
        )

    def _scheduler(self, optimizer: Optimizer, start: int) -> LambdaLR:
        """Warm-up, then a cosine that ends with the story."""
        total, warmup = self.settings.total_steps, self.settings.warmup_steps

        def factor(step: int) -> float:
            cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, (start + step) / total)))
            return min(1.0, (step + 1) / (warmup + 1)) * (_LR_FLOOR + (1.0 - _LR_FLOOR) * cosine)

        return LambdaLR(optimizer, factor)

    def twin_of_host(self, twin: MorphogeneticModel) -> tuple[AdamW, LambdaLR]:
        """Optimizer and schedule for a copy of the host, as far as the host's are."""
        settings = self.settings
        optimizer = AdamW(twin.host_parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        scheduler = self._scheduler(optimizer, start=0)
        optimizer.load_state_dict(copy.deepcopy(self.host_optimizer.state_dict()))
        scheduler.load_state_dict(self.host_scheduler.state_dict())
        return optimizer, scheduler

    def train_seed(self, start: int) -> None:
        """Make optimizer and schedule for the seed that was grafted after ``start`` steps."""
        settings = self.settings
        self.seed_optimizer = AdamW(
            self.model.seed_parameters(self.slot.name),
            lr=settings.seed_lr,
            weight_decay=settings.weight_decay,
        )
        self.seed_scheduler = self._scheduler(self.seed_optimizer, start=start)
        if self.governor is not None:
            self.governor.add_optimizer(self.seed_optimizer)
            self.governor.add_scheduler(self.seed_scheduler)
            self.governor.notify_structure_changed()

    def release_seed(self) -> None:
        """The seed is gone: so are its optimizer and schedule."""
        if self.governor is not None and self.seed_optimizer is not None:
            self.governor.remove_optimizer(self.seed_optimizer)
            self.governor.notify_structure_changed()
        self.seed_optimizer, self.seed_scheduler = None, None

    # ------------------------------------------------------------------ on disk

    def save(self, folder: Path, bookmark: Callable[[], Bookmark]) -> Future[Path]:
        """Write a state to go on from: the governor's last known good one, else the one of now.

        Args:
            folder: of snapshots.
            bookmark: says the place in the story.

        Returns:
            A future whose ``result()`` waits, and raises SnapshotError if the state could not be written.
            Without a governor it is done already.
        """
        if self.governor is not None:
            return self.governor.save(folder)
        from tolaria.governor.saving import Save

        future = Future[Path]()
        try:
            now = Snapshot(
                self.model,
                self.optimizers,
                schedulers=self.schedulers,
                scaler=self.scaler,
                extras={EXTRA: Bookmarker(bookmark)},
            )
            now.capture()
            parts = {"step": bookmark().step, "governor": None, **now.state_dict()}
            future.set_result(Save(folder, parts).write(rest=0.0))
        except SnapshotError as error:
            future.set_exception(error)
        return future

    def load(self, state: Mapping[str, Any], bookmark: Bookmark) -> None:
        """Put a saved state back into what was made anew, as then; a governor is attached afterwards.

        Raises:
            SnapshotError: it does not fit.
        """
        try:
            self.model.load_structure({self.slot.name: bookmark.slot})
            if self.slot.seed is not None:
                self.train_seed(bookmark.seed_start)
            self._load_model(state["model"], bookmark)
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            # Schedules of seeds that are gone lie between the host's and the one of the seed there is.
            for schedule, saved in zip(
                self.schedulers, (state["schedulers"][i] for i in (0, -1)), strict=False
            ):
                schedule.load_state_dict(saved)
            if self.scaler is not None:
                self.scaler.load_state_dict(state["scaler"])
            if bookmark.stream is not None:  # the seed itself is in place, and draws on from there
                self.slot.load_rollback_state({"seed": {}, "stream": bookmark.stream}, keep_seed=True)
            self.stream.go_to(bookmark.data)
        except SnapshotError:
            raise
        except Exception as error:
            raise SnapshotError(f"the saved state does not fit this run: {error}") from error

    def _load_model(self, saved: Mapping[str, Any], bookmark: Bookmark) -> None:
        """Put the tensors back; those of a seed that is no fossil, and its alpha, come from the bookmark."""
        slot = self.slot
        found = self.model.load_state_dict(saved, strict=False)
        path = next(name for name, module in self.model.named_modules() if module is slot)
        missing = [
            n for n in found.missing_keys if bookmark.seed is None or not n.startswith(f"{path}.seed.")
        ]
        if missing or found.unexpected_keys:
            raise SnapshotError(
                f"the saved state does not fit this run: missing {missing[:3]}, "
                f"unknown {found.unexpected_keys[:3]}"
            )
        if bookmark.seed is not None:
            load_seed(slot, bookmark.seed)
        if slot.schedule is not None:
            slot.schedule.load_state_dict(bookmark.slot["schedule"])

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Random numbers go on as they would have, and so does the governor, if there is one.

        Raises:
            SnapshotError: the state was saved with a governor, or without one, and now it is otherwise.
        """
        if (state["governor"] is None) != (self.governor is None):
            raise SnapshotError("the saved state does not fit this run: one has a governor, the other none")
        Generators(self.device).load(state["rng"], 0)
        if self.governor is not None:
            self.governor.poll()  # that it was attached again is no news of this run
            self.governor.load_state_dict(state["governor"])

"""What a seed slot consists of, and how a rollback takes it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from tolaria.nn.probe import SeedTraits
from tolaria.nn.randomness import RandomStream
from tolaria.nn.schedule import AlphaSchedule
from tolaria.nn.stage import SeedStage

_OF_A_SEED = (
    "seed",
    "_stage",
    "schedule",
    "blueprint",
    "options",
    "rng_seed",
    "generation",
    "_traits",
    "_stream",
)


class SlotState(nn.Module):
    """The state of a :class:`SeedSlot`, and its part in a rollback.

    Args:
        name: how errors and events call this slot.
    """

    alpha: Tensor
    alpha_limit: Tensor
    alpha_position: Tensor

    def __init__(self, name: str = "slot") -> None:
        super().__init__()
        self.name = name
        self.seed: nn.Module | None = None
        self.blueprint: str | None = None
        self.options: dict[str, object] = {}
        self.rng_seed: int | None = None
        self.generation = 0
        self.schedule: AlphaSchedule | None = None
        self._stage = SeedStage.DORMANT
        self._traits = SeedTraits()
        self._stream: RandomStream | None = None
        self._shares: Tensor | None = None
        self.register_buffer("alpha", torch.zeros((), dtype=torch.float32))
        # What a device-side rollback zeroes beside alpha, so that a schedule that still runs cannot raise it
        # again.
        self.register_buffer("alpha_limit", torch.ones((), dtype=torch.float32), persistent=False)
        self.register_buffer("alpha_position", torch.zeros((), dtype=torch.int64), persistent=False)

    @property
    def stage(self) -> SeedStage:
        """Where the seed stands."""
        return self._stage

    def _drop(self, stage: SeedStage) -> None:
        self.seed, self._stream, self.schedule = None, None, None
        self._traits = SeedTraits()
        self.blueprint, self.options, self.rng_seed = None, {}, None
        self._set_alpha(0.0, limit=1.0)
        self._stage = stage

    def _set_alpha(self, value: float, *, limit: float) -> None:
        self.alpha.fill_(value)
        self.alpha_limit.fill_(limit)
        self.alpha_position.zero_()

    # ------------------------------------------------------------------ rollback protocol (see
    # tolaria.governor)

    def rollback_state(self) -> dict[str, object]:
        """What a snapshot keeps of this slot beside its tensors."""
        return {
            "stage": self._stage,
            "generation": self.generation,
            "stream": self._stream.state() if self._stream is not None else None,
            "seed": {name: getattr(self, name) for name in _OF_A_SEED},
        }

    def load_rollback_state(self, captured: dict[str, object] | None, *, keep_seed: bool = False) -> None:
        """Follow a restore of the tensors: a seed that was not FOSSILIZED at capture is dropped.

        Args:
            captured: what :meth:`rollback_state` returned at capture; None if the slot was not known then.
            keep_seed: the seed of then comes back at its stage instead, whatever that was.
        """
        if keep_seed and captured is not None:
            for name, value in captured["seed"].items():  # type: ignore[attr-defined]
                setattr(self, name, value)
            if self._stream is not None:
                self._stream.load_state(captured["stream"])  # type: ignore[arg-type]
            return
        stage = captured["stage"] if captured is not None else SeedStage.DORMANT
        same_seed = (
            captured is not None and captured["generation"] == self.generation and self.seed is not None
        )
        if stage is SeedStage.FOSSILIZED and same_seed:
            assert captured is not None
            self.alpha_limit.fill_(1.0)
            self.schedule, self._stage = None, SeedStage.FOSSILIZED
            if self._stream is not None and captured["stream"] is not None:
                self._stream.load_state(captured["stream"])  # type: ignore[arg-type]
            return
        self._drop(SeedStage.DORMANT if stage is SeedStage.DORMANT else SeedStage.CULLED)

    def zero_alpha_tensors(self) -> list[Tensor]:
        """What a capture taken now restores as 0: alpha and its limit, unless the seed is a fossil."""
        return [] if self._stage is SeedStage.FOSSILIZED else [self.alpha, self.alpha_limit]

    def incubating_tensors(self) -> list[Tensor]:
        """Tensors of a seed that cannot reach the loss yet; a non-finite value there culls it alone."""
        if self.seed is None or self._stage not in (SeedStage.GERMINATED, SeedStage.TRAINING):
            return []
        return [*self.seed.parameters(), *self.seed.buffers()]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``.to``, ``.half`` and friends move alpha but leave it float32."""
        kept = {name: getattr(self, name) for name in ("alpha", "alpha_limit")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        if self.schedule is not None:
            self.schedule.rebind(self.alpha, self.alpha_position, self.alpha_limit)
        return self

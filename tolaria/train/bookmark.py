"""Where a story stands: beside model, optimizers and governor all that it needs to go on from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from tolaria.errors import SnapshotError
from tolaria.nn.slot import SeedSlot
from tolaria.nn.stage import SeedStage
from tolaria.train.observers import PhaseRecord, SeedRecord, ValidationRecord
from tolaria.train.validate import Metrics

EXTRA = "story"
"""The name under which a saved state holds a bookmark, among its ``extras``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bookmark:
    """A place in a story."""

    step: int
    """Steps taken."""
    phase: str
    """The phase under way."""
    phase_start: int
    """Steps taken before it."""
    phase_end: int
    """Steps taken when it will be over."""
    phase_seconds: float
    """Wall time of the phase so far."""
    seconds: float
    """Wall time of the run so far."""
    needs_seed: bool
    """Whether the phase began with a seed."""
    germinations: int
    """Seeds grafted so far."""
    seed_start: int
    """Steps taken before the last seed was grafted."""
    outcome: str
    """As in :class:`GrowthResult`."""
    validations: int
    """Looks at the validation data so far."""
    host_test: Metrics | None
    """As in :class:`GrowthResult`."""
    phases: list[PhaseRecord]
    """Phases that are over."""
    seeds: list[SeedRecord]
    """What happened to seeds so far."""
    slot: dict[str, Any]
    """For :meth:`SeedSlot.load_structure`; its schedule's position is a tensor until it is read back."""
    seed: dict[str, Tensor] | None
    """What a seed that is no fossil consists of, for :func:`load_seed`: a rollback would drop it, so that no
    capture of a governor has it."""
    stream: dict[str, Any] | None
    """Where the random numbers of the seed stand."""
    data: dict[str, Any]
    """For :meth:`BatchStream.go_to`."""
    control: dict[str, Tensor] | None = None
    """For :meth:`Control.load`; None before a seed is blended in."""

    def to_plain(self) -> dict[str, Any]:
        """Plain values and tensors, for :meth:`from_plain`."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values["host_test"] = None if self.host_test is None else self.host_test._asdict()
        values["phases"] = [asdict(phase) for phase in self.phases]
        values["seeds"] = [{**asdict(seed), "stage": seed.stage.name} for seed in self.seeds]
        return values

    @classmethod
    def from_plain(cls, saved: Mapping[str, Any]) -> Bookmark:
        """What :meth:`to_plain` was called of.

        Raises:
            SnapshotError: it is something else.
        """
        try:
            values = dict(saved)
            schedule = values["slot"]["schedule"]
            if schedule is not None:
                schedule = {**schedule, "position": int(schedule["position"])}
            values["slot"] = {**values["slot"], "schedule": schedule}
            host_test = values["host_test"]
            values["host_test"] = None if host_test is None else Metrics(**host_test)
            values["phases"] = [PhaseRecord(**phase) for phase in values["phases"]]
            values["seeds"] = [
                SeedRecord(**{**seed, "stage": SeedStage[seed["stage"]]}) for seed in values["seeds"]
            ]
            return cls(**values)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise SnapshotError(
                f"expected the place of a run of this version, got another: {error!r}"
            ) from error


class Bookmarker:
    """Among a governor's extras: each capture holds the place of the story at that moment.

    A rollback leaves the story where it is, since steps that were lost are not counted again.
    """

    def __init__(self, say: Callable[[], Bookmark]) -> None:
        self._say = say

    def state_dict(self) -> dict[str, Any]:
        """The place of now."""
        return self._say().to_plain()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing: see above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """A saved state to go on from, and what the run has said before it."""

    state: Mapping[str, Any]
    """What :func:`tolaria.load_snapshot` read."""
    bookmark: Bookmark
    """The place in the story."""
    validations: Sequence[ValidationRecord]
    """Every look at the validation data up to there."""
    events: Sequence[Mapping[str, Any]]
    """The lines of ``events.jsonl`` up to there."""


def seed_bytes(slot: SeedSlot) -> dict[str, Tensor] | None:
    """The seed in ``slot`` as uint8 tensors, if a rollback would drop it; some share memory with the seed.

    They are where the seed is: this is asked for at captures, which never wait for a device. Bytes, since it
    is no business of a governor whether what it need not put back is finite.
    """
    if slot.seed is None or not slot.zero_alpha_tensors():
        return None
    state = slot.seed.state_dict()
    return {name: value.contiguous().reshape(-1).view(torch.uint8) for name, value in state.items()}


def load_seed(slot: SeedSlot, saved: Mapping[str, Tensor]) -> None:
    """Put what :func:`seed_bytes` said back into a seed of the same blueprint.

    Raises:
        RuntimeError: it is another.
    """
    assert slot.seed is not None, "it was grafted before"
    state = slot.seed.state_dict()
    slot.seed.load_state_dict({
        name: value.view(state[name].dtype).view(state[name].shape) if name in state else value
        for name, value in saved.items()
    })  # fmt: skip

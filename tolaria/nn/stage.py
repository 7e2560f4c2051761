"""The life of a seed: its stages and the transitions between them."""

from __future__ import annotations

from enum import Enum


class SeedStage(Enum):
    """Where the seed of a slot stands."""

    DORMANT = "dormant"
    """No seed yet; the slot passes its features through untouched."""
    GERMINATED = "germinated"
    """A seed is in place, shape-checked; it is not read yet."""
    TRAINING = "training"
    """Incubating: the seed learns from detached features, the host does not notice."""
    BLENDING = "blending"
    """The seed's output is blended in, by alpha."""
    FOSSILIZED = "fossilized"
    """The seed is part of the network for good (alpha is 1)."""
    CULLED = "culled"
    """The seed was taken out; the slot passes its features through untouched and may germinate again."""


TRANSITIONS: dict[SeedStage, tuple[SeedStage, ...]] = {
    SeedStage.DORMANT: (SeedStage.GERMINATED,),
    SeedStage.GERMINATED: (SeedStage.TRAINING, SeedStage.CULLED),
    SeedStage.TRAINING: (SeedStage.BLENDING, SeedStage.CULLED),
    SeedStage.BLENDING: (SeedStage.FOSSILIZED, SeedStage.CULLED),
    SeedStage.FOSSILIZED: (),
    SeedStage.CULLED: (SeedStage.GERMINATED, SeedStage.DORMANT),
}
"""The stages that may follow each stage (a rollback may also return a slot to an earlier one)."""


class IllegalTransitionError(ValueError):
    """A seed cannot go from its stage to the one asked for."""


def check_transition(slot: str, stage: SeedStage, target: SeedStage) -> None:
    """Raise unless ``target`` may follow ``stage``.

    Raises:
        TypeError: ``target`` is not a SeedStage.
        IllegalTransitionError: naming the slot, both stages and what is allowed.
    """
    if not isinstance(target, SeedStage):
        raise TypeError(f"slot {slot!r}: stage: expected a SeedStage, got {target!r}")
    allowed = TRANSITIONS[stage]
    if target not in allowed:
        names = ", ".join(each.name for each in allowed) or "nothing (it is part of the network for good)"
        raise IllegalTransitionError(
            f"slot {slot!r}: expected a stage that may follow {stage.name} ({names}), got {target.name}"
        )

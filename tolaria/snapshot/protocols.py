"""What an object must have to take part in a snapshot: the methods are enough, nobody inherits these."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Stateful(Protocol):
    """Anything that can be saved and loaded: a scheduler, an EMA, a sampler."""

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to come back here."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Go back to a saved state."""
        ...


class TakesPartInRollback(Protocol):
    """A module with host-side state of its own, such as a seed slot's stage."""

    def rollback_state(self) -> dict[str, Any]:
        """Host-side facts at a capture."""
        ...

    def load_rollback_state(self, captured: dict[str, Any] | None, /, *, keep_seed: bool = False) -> None:
        """Go back to the captured facts (None: it was not there), after the tensors were restored.

        Args:
            captured: what :meth:`rollback_state` returned.
            keep_seed: a seed that was there comes back at its stage; without, a governor's rollback drops it
                unless it was a fossil.
        """
        ...

    def zero_alpha_tensors(self) -> list[Tensor]:
        """Alpha tensors that a capture writes as zero: those of seeds that a rollback drops."""
        ...


class HoldsSeed(Protocol):
    """A module whose seed may incubate: it cannot reach the loss, so a poisoned one is culled alone."""

    def incubating_tensors(self) -> list[Tensor]:
        """Tensors of the incubating seed; empty without one."""
        ...

    def cull(self) -> object:
        """Drop the seed."""
        ...

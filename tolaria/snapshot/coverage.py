"""What belongs to the run and is not covered: refused, or named in one warning, at attach."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from tolaria.errors import UncoveredWarning
from tolaria.snapshot.covered import CoveredState, CoveredTensor
from tolaria.snapshot.inner_optimizers import inner_optimizers

_SHARDED = {"DTensor", "FlatParameter"}


def check_unsharded(covered: CoveredState) -> None:
    """Refuse what lies in pieces on several ranks, which a rollback of one rank would tear.

    Raises:
        RuntimeError: a parameter or buffer is a shard, or a module shards its parameters.
    """
    walk = covered.walk()
    for prefix, path, module in walk.modules:
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise _sharded(prefix + path or "the model", "FullyShardedDataParallel")
    for candidate in covered.candidates(walk):
        tensor = candidate.tensor
        kinds = {kind.__name__ for kind in type(tensor).__mro__} & _SHARDED
        if kinds or hasattr(tensor, "placements") or getattr(tensor, "_is_flat_param", False):
            raise _sharded(candidate.name, *(kinds or {type(tensor).__name__}))


def _sharded(name: str, kind: str) -> RuntimeError:
    return RuntimeError(
        f"model: {name} is sharded ({kind}), which is not supported; a rollback needs whole parameters on "
        "every rank, as under DistributedDataParallel"
    )


class Coverage:
    """Remembers what has been said, so that each thing is said once."""

    def __init__(self, covered: CoveredState) -> None:
        self._covered = covered
        self._told: set[str] = set()

    def look(self, *, attaching: bool = False) -> None:
        """Warn of what is not covered; silent where nothing is new.

        Args:
            attaching: look for optimizers of something else, too; later they may be those of a seed that is
                gone.
        """
        found = [*map(_elsewhere, self._covered.elsewhere()), *_wrapped(self._covered)]
        found += _strangers(self._covered) if attaching else ()
        new = [text for text in found if text not in self._told]
        self._told.update(new)
        if new:
            more = f"; and {len(new) - 8} more" if len(new) > 8 else ""
            voice = self._covered.voice
            warnings.warn(
                f"{voice.who}: {voice.restore} does not put back {'; '.join(new[:8])}{more}",
                UncoveredWarning,
                stacklevel=2,
            )


def _elsewhere(candidate: CoveredTensor) -> str:
    return (
        f"{candidate.name}, which is on {candidate.tensor.device}: move it to the device of the model's "
        "parameters, or hand it over in extras="
    )


def _wrapped(covered: CoveredState) -> Iterator[str]:
    """Optimizers inside of others, whose state is their own."""
    for i, optimizer in enumerate(covered.optimizers):
        for name, inner in inner_optimizers(optimizer):
            if not any(inner is known for known in covered.optimizers):
                yield (
                    f"the state of optimizers[{i}].{name} ({type(inner).__name__}), which "
                    f"{type(optimizer).__name__} wraps: hand over both"
                )


def _strangers(covered: CoveredState) -> Iterator[str]:
    """Optimizers that train nothing of the model: of another copy of it, or of parameters replaced since."""
    own = {id(p) for *_, module in covered.walk().modules for _, p in module._parameters.items()}
    for i, optimizer in enumerate(covered.optimizers):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if params and own and not any(id(p) in own for p in params):
            yield (
                f"more than the parameters of optimizers[{i}] ({type(optimizer).__name__}), none of which is "
                "the model's: make it of model.parameters(), or hand over the module it trains in extras="
            )

"""Batches without an end, and where in the data they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tolaria.tasks.data import Batch, Batches


class BatchStream:
    """Epoch after epoch of a loader; knows its place in it, and finds it again.

    Args:
        loader: iterated anew for each epoch. With ``state_dict`` and ``load_state_dict`` (as
            :class:`TensorBatches` has them) a place is found by going through one epoch at most; without
            them all epochs are gone through, which must come as they came then.
    """

    def __init__(self, loader: Batches) -> None:
        self._loader = loader
        self._epoch, self._taken = 0, 0
        self._order: Any = None
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while True:
            if self._batches is None:
                self._order = self._state_of_loader()
                self._batches, self._taken = iter(self._loader), 0
            for batch in self._batches:
                self._taken += 1
                return batch
            self._batches = None
            self._epoch += 1

    def _state_of_loader(self) -> object:
        """What brings the order of the epoch that begins now back; None: the loader cannot say it."""
        say, load = (getattr(self._loader, name, None) for name in ("state_dict", "load_state_dict"))
        return say() if callable(say) and callable(load) else None

    def place(self) -> dict[str, Any]:
        """Where the next batch comes from, for :meth:`go_to`."""
        if self._batches is None:
            return {"epoch": self._epoch, "taken": 0, "order": self._state_of_loader()}
        return {"epoch": self._epoch, "taken": self._taken, "order": self._order}

    def go_to(self, place: Mapping[str, Any]) -> None:
        """Go on with the batch that followed ``place``, over a loader that was made like the one of then.

        Raises:
            ValueError: the loader has fewer batches than were taken of one epoch, or refuses its state.
        """
        if place["order"] is not None:
            self._loader.load_state_dict(place["order"])  # type: ignore[attr-defined]
        else:
            for _ in range(place["epoch"]):
                for _ in self._loader:
                    pass
        self._epoch, self._taken, self._batches = place["epoch"], 0, None
        if not place["taken"]:
            return
        self._order, self._batches = self._state_of_loader(), iter(self._loader)
        for _ in range(place["taken"]):
            if next(self._batches, None) is None:
                raise ValueError(
                    f"data: expected {place['taken']} batches or more in an epoch, as when the run was "
                    f"interrupted, got {self._taken}"
                )
            self._taken += 1

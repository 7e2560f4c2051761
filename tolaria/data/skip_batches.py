"""Batches that are left out after a rollback."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from tolaria.governor.batches import BatchDebt, BatchLedger

T = TypeVar("T")
_MOST = 4096


class HasBatchLedger(Protocol):
    """What is needed of a governor."""

    @property
    def batch_ledger(self) -> BatchLedger:
        """How many batches its rollbacks leave out."""
        ...


class LeftOutBatch(NamedTuple):
    """A batch that was left out."""

    epoch: int
    """In which iteration over the loader, from 0."""
    number: int
    """Which batch of the loader in that iteration, from 0."""


class SkipBatches(Generic[T]):
    """A loader that leaves ``config.skip_batches`` batches out after each rollback of a governor.

    Going back alone meets the data that broke the run once more, or what comes right behind it; leaving some
    batches out after going back is the recipe of PaLM (arXiv:2204.02311, section 5.1)::

        governor = TolariaGovernor(model, optimizer, config=GovernorConfig(skip_batches=200))
        for x, y in SkipBatches(loader, governor):
            ...
            governor.step(loss)

    Batches are drawn from the loader and dropped, so that workers, prefetching, samplers and shuffling go on
    as they would. A rollback by hand leaves batches out as well; with ``log_only`` there is none. On CUDA the
    host hears of a rollback at one of the next calls of ``step()``, and leaves out from there; of several
    ranks there one may do so a step later than another, and so end an epoch a batch later. If the loader
    ends meanwhile, the iteration ends, and the next one leaves the rest out, be it over this object or over
    another for the same governor. Of two loaders that are iterated side by side each leaves out its own; one
    around the other leaves out once.

    The loops of :mod:`tolaria.train` do this by themselves. Attributes are the loader's (``set_epoch``,
    ``sampler``, ``state_dict``), and so is the length, which counts batches that may be left out.

    Args:
        loader: any iterable: a DataLoader, a list, a generator.
        governor: whose rollbacks count, or several; of these the one that has most to leave out.

    Raises:
        TypeError: one is of another kind; a bank's environments have no batches.
        ValueError: no governor, or one twice.

    Attributes:
        loader: the loader.
        left_out: the last 4096 batches that were left out, oldest first.
    """

    def __init__(self, loader: Iterable[T], governor: HasBatchLedger | Sequence[HasBatchLedger]) -> None:
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            raise TypeError(
                f"loader: expected an iterable of batches, got {type(loader).__name__}; hand over what the "
                "for loop iterates"
            )
        self.loader = loader
        self._governors = _checked(governor)
        self._epochs = 0
        self._left_out: deque[LeftOutBatch] = deque(maxlen=_MOST)

    @property
    def left_out(self) -> tuple[LeftOutBatch, ...]:
        """The last 4096 batches that were left out, oldest first."""
        return tuple(self._left_out)

    def __iter__(self) -> Iterator[T]:
        batches = _Batches(iter(self.loader), self._governors, self._epochs, self._left_out)
        self._epochs += 1
        return batches

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # the loader says it if it has none

    def __bool__(self) -> bool:
        return bool(self.loader)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  (the loader's)
        if name == "loader" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.loader, name)


class _Batches(Iterator[T]):
    """One iteration."""

    def __init__(
        self,
        batches: Iterator[T],
        governors: tuple[HasBatchLedger, ...],
        epoch: int,
        left_out: deque[LeftOutBatch],
    ) -> None:
        self._batches, self._governors = batches, governors
        self._debts = [BatchDebt(governor.batch_ledger) for governor in governors]
        self._epoch, self._index, self._left_out = epoch, 0, left_out

    def __next__(self) -> T:
        pairs = list(zip(self._debts, self._governors, strict=True))
        for debt, governor in pairs:
            debt.due(governor.batch_ledger)
        while True:
            batch = next(self._batches)
            self._index += 1
            if not any([debt.drawn() for debt in self._debts]):
                return batch
            for debt in self._debts:
                debt.pay()
            self._left_out.append(LeftOutBatch(self._epoch, self._index - 1))


def _checked(governor: HasBatchLedger | Sequence[HasBatchLedger]) -> tuple[HasBatchLedger, ...]:
    governors = tuple(governor) if isinstance(governor, list | tuple) else (governor,)
    for each in governors:
        if not isinstance(getattr(each, "batch_ledger", None), BatchLedger):
            raise TypeError(
                f"governor: expected a TolariaGovernor, or a sequence of them, got {type(each).__name__}; a "
                "bank has no batches"
            )
    if not governors or len({id(each) for each in governors}) < len(governors):
        raise ValueError(f"governor: expected one governor or more, each once, got {len(governors)}")
    return governors

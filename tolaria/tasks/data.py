"""Data in memory: batches with a random stream of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


class Batches(Protocol):
    """An iterable of ``(inputs, targets)`` that may be iterated again and again; each pass is one epoch."""

    def __iter__(self) -> Iterator[Batch]:
        """One epoch."""
        ...

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...


class TensorBatches:
    """Batches of rows of two tensors, shuffled anew each epoch by a generator of its own.

    Args:
        inputs: (N, ...).
        targets: (N, ...).
        batch_size: rows in a batch, >= 1; the last batch of an epoch may be smaller.
        shuffle: whether the order changes; if not, every epoch is the same.
        rng_seed: seeds the order; the global random streams are never touched.
        drop_last: leave a smaller last batch out.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        batch_size: int,
        *,
        shuffle: bool = False,
        rng_seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        _check_batch_size(batch_size)
        if len(inputs) != len(targets):
            raise ValueError(
                f"TensorBatches: targets: expected {len(inputs)} rows like inputs, got {len(targets)}"
            )
        self.inputs, self.targets = inputs, targets
        self.batch_size, self.shuffle, self.drop_last = batch_size, shuffle, drop_last
        self._generator = torch.Generator().manual_seed(rng_seed)

    def __len__(self) -> int:
        """Batches in an epoch."""
        rows = len(self.inputs)
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """One epoch."""
        rows = len(self.inputs)
        if not self.shuffle:
            for start in range(0, len(self) * self.batch_size, self.batch_size):
                yield (
                    self.inputs[start : start + self.batch_size],
                    self.targets[start : start + self.batch_size],
                )
            return
        order = torch.randperm(rows, generator=self._generator, device="cpu")
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            chosen = order[start : start + self.batch_size]
            yield self.inputs[chosen], self.targets[chosen]

    def state_dict(self) -> dict[str, Tensor]:
        """Where the order of epochs stands."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue with the epochs that followed ``state``.

        Raises:
            ValueError: ``state`` is nothing that :meth:`state_dict` returned; the order then stays.
        """
        _set_generator(self._generator, state)


class WindowBatches:
    """Batches of windows of a long sequence: inputs ``tokens[i : i + length]``, targets one further.

    Args:
        tokens: (N,) int64.
        length: tokens in a window.
        batch_size: windows in a batch.
        shuffle: random starts (an epoch is then about one pass over the tokens); else windows side by side.
        rng_seed: seeds the starts; the global random streams are never touched.
    """

    def __init__(
        self, tokens: Tensor, length: int, batch_size: int, *, shuffle: bool = False, rng_seed: int = 0
    ) -> None:
        _check_batch_size(batch_size)
        if tokens.dim() != 1 or len(tokens) <= length:
            raise ValueError(
                f"WindowBatches: tokens: expected more than {length} in one row, got {tuple(tokens.shape)}"
            )
        self.tokens, self.length, self.batch_size, self.shuffle = tokens, length, batch_size, shuffle
        self._generator = torch.Generator().manual_seed(rng_seed)

    def __len__(self) -> int:
        """Batches in an epoch."""
        windows = (len(self.tokens) - 1) // self.length
        return -(-windows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """One epoch."""
        side_by_side = torch.arange(0, len(self.tokens) - self.length, self.length, device="cpu")
        within = torch.arange(self.length, device="cpu")
        for index in range(len(self)):
            if self.shuffle:
                last = len(self.tokens) - self.length
                starts = torch.randint(last, (self.batch_size,), generator=self._generator, device="cpu")
            else:
                starts = side_by_side[index * self.batch_size : (index + 1) * self.batch_size]
            where = starts[:, None] + within
            yield self.tokens[where], self.tokens[where + 1]

    def state_dict(self) -> dict[str, Tensor]:
        """Where the random starts stand."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue with the windows that followed ``state``.

        Raises:
            ValueError: ``state`` is nothing that :meth:`state_dict` returned; the starts then stay.
        """
        _set_generator(self._generator, state)


def _set_generator(generator: torch.Generator, state: Mapping[str, Tensor]) -> None:
    """Put back what ``state_dict`` saved of a generator."""
    fits = isinstance(state, Mapping) and set(state) == {"generator"}
    if not fits or not isinstance(state["generator"], Tensor):
        raise ValueError(f"state: expected {{'generator': a state of torch.Generator}}, got {state!r:.80}")
    try:
        generator.set_state(state["generator"])
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"state: generator: expected a state of torch.Generator; torch says: {error}"
        ) from None


def _check_batch_size(batch_size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskData:
    """What a task trains on, chooses by and is measured on."""

    train: Batches
    """Shuffled training batches."""
    validation: Batches
    """Held out of the training part; decides whether a seed is kept."""
    test: Batches
    """Never looked at while training decides anything."""

"""Random streams left as found: a context that puts every generator back, and a stream of a seed's own.

A seed must not shift the dice of its host. Its initialisation runs inside :func:`preserve_random_state`, and
a seed that draws random numbers in its forward (dropout, stochastic depth) does so from a
:class:`RandomStream`.
"""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral

import torch
from torch import Tensor

from tolaria.nn.recomputation import is_backward, replayed

StreamName = str
"""``"torch"``, ``"python"``, ``"numpy"`` or ``"cuda:<index>"``."""


def _equal(left: object, right: object) -> bool:
    """Whether two generator states are the same (tensors, tuples and numpy arrays compared by value)."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.equal(left, right)
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(_equal(a, b) for a, b in zip(left, right, strict=True))
    if hasattr(left, "tobytes") and hasattr(right, "tobytes"):
        return bool(left.tobytes() == right.tobytes())
    return left == right


def _numpy_random() -> object | None:
    """``numpy.random`` if numpy is loaded (nobody can have drawn from it otherwise)."""
    return getattr(sys.modules.get("numpy"), "random", None)


def _streams() -> dict[StreamName, tuple[Callable[[], object], Callable[[object], object]]]:
    """For each stream that exists in this process, how its state is read and set."""
    streams: dict[StreamName, tuple[Callable[[], object], Callable[[object], object]]] = {
        "torch": (torch.get_rng_state, torch.set_rng_state),  # type: ignore[dict-item]
        "python": (random.getstate, random.setstate),  # type: ignore[dict-item]
    }
    numpy_random = _numpy_random()
    if numpy_random is not None:
        streams["numpy"] = (numpy_random.get_state, numpy_random.set_state)  # type: ignore[attr-defined]
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for index, generator in enumerate(torch.cuda.default_generators):
            streams[f"cuda:{index}"] = (generator.get_state, generator.set_state)  # type: ignore[assignment]
    return streams


def random_state(names: Collection[StreamName] | None = None) -> dict[StreamName, object]:
    """The state of the global random streams (torch, CUDA, Python, numpy), or of those in ``names``."""
    return {name: get() for name, (get, _) in _streams().items() if names is None or name in names}


def set_random_state(states: Mapping[StreamName, object]) -> None:
    """Put back what :func:`random_state` returned; a stream that is gone is left out."""
    streams = _streams()
    for name, state in states.items():
        if name in streams:
            streams[name][1](state)


@contextmanager
def preserve_random_state(*generators: torch.Generator) -> Iterator[None]:
    """Leave every global random stream, and the given generators, as found.

    Args:
        generators: further generators to put back (a DataLoader's own, for example).
    """
    states = random_state()
    own = [(generator, generator.get_state()) for generator in generators]
    try:
        yield
    finally:
        set_random_state(states)
        for generator, state in own:
            generator.set_state(state)


def streams_drawn(before: Mapping[StreamName, object]) -> frozenset[StreamName]:
    """Names of the streams that have moved since ``before`` (a result of :func:`random_state`)."""
    after = random_state()
    return frozenset(name for name, state in before.items() if not _equal(state, after[name]))


def check_rng_seed(rng_seed: object) -> None:
    """Raise unless ``rng_seed`` can seed a torch generator, or is None.

    Raises:
        TypeError: not an integer.  ValueError: out of range.
    """
    if rng_seed is None:
        return
    if isinstance(rng_seed, bool) or not isinstance(rng_seed, Integral):
        raise TypeError(f"rng_seed: expected an integer or None, got {rng_seed!r}")
    if not -(2**63) <= int(rng_seed) < 2**63:
        raise ValueError(f"rng_seed: expected an integer of at most 63 bits and a sign, got {rng_seed}")


def derive_seed(*parts: object) -> int:
    """A 32-bit seed made of ``parts`` and the process's initial torch seed; draws from no stream."""
    return zlib.crc32("/".join(str(part) for part in (torch.initial_seed(), *parts)).encode())


class RandomStream:
    """The random numbers of one seed: swapped in around its forward, so that the host's stay where they are.

    Where activation checkpointing runs a forward anew (torch's, or any by a Python ``autograd.Function``) the
    stream replays what that very forward drew, however many came in between. A forward that is run anew in a
    backward pass in another way replays what the latest one drew. Generators are swapped on the host, so a
    seed that draws random numbers cannot be recorded in a CUDA graph.

    Args:
        names: the streams that the seed draws from.
        rng_seed: where its own streams begin.
    """

    def __init__(self, names: frozenset[StreamName], rng_seed: int) -> None:
        self.names = names
        self._states = self._initial_states(names, rng_seed)
        self._latest: dict[StreamName, object] | None = None

    @staticmethod
    def _initial_states(names: frozenset[StreamName], rng_seed: int) -> dict[StreamName, object]:
        with preserve_random_state():
            torch.default_generator.manual_seed(rng_seed)
            random.seed(rng_seed)
            numpy_random = _numpy_random()
            if numpy_random is not None:
                numpy_random.seed(rng_seed % 2**32)  # type: ignore[attr-defined]
            for name in names:
                if name.startswith("cuda:"):
                    torch.cuda.default_generators[int(name[5:])].manual_seed(rng_seed)
            return random_state(names)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within this context the global streams are the seed's; afterwards they are as found."""
        host = random_state(self.names)
        again = replayed(self, dict(self._states))
        if again is None and is_backward():
            again = self._latest
        replaying = again is not None
        if again is None:
            again = self._latest = dict(self._states)
        set_random_state(again)
        try:
            yield
        finally:
            if not replaying:
                self._states = random_state(self.names)
            set_random_state(host)

    def state(self) -> dict[StreamName, object]:
        """Where the stream stands, for :meth:`load_state`."""
        return dict(self._states)

    def load_state(self, states: Mapping[StreamName, object]) -> None:
        """Continue from a result of :meth:`state`."""
        self._states = dict(states)
        self._latest = None

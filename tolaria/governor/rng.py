"""The random generators that a capture covers, and what they draw after a restore."""

from __future__ import annotations

import hashlib
import pickle
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from tolaria.governor.tracked import TrackedState


def rng_state(tracked: TrackedState) -> dict[str, Any]:
    """The state of every generator that ``restore_rng`` covers; empty where it is off."""
    if not tracked.restore_rng:
        return {}
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "generators": [g.get_state() for g in tracked.generators],
    }
    if tracked.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(tracked.device)
    return state


def load_rng_state(tracked: TrackedState, state: dict[str, Any], repeats: int) -> None:
    """Put the generators back to :func:`rng_state`.

    Args:
        tracked: whose generators they are.
        state: what :func:`rng_state` returned.
        repeats: how often this state was put back before. At 0 the draws are those that followed the
            capture. Else every generator is seeded anew from its captured state and this number: the same
            draws would lead to the same bad batch again. Merely to move it on would not do, since draws that
            are shifted by a few numbers are nearly the same batch.
    """
    if not state:
        return
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    for generator, own in zip(tracked.generators, state["generators"], strict=True):
        generator.set_state(own)
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], tracked.device)
    if repeats:
        _seed_anew(tracked, state, repeats)


def _seed_anew(tracked: TrackedState, state: dict[str, Any], repeats: int) -> None:
    own = [
        (g, _seed(_bytes(s), repeats)) for g, s in zip(tracked.generators, state["generators"], strict=True)
    ]
    if "cuda" in state:
        own.append(
            (torch.cuda.default_generators[tracked.device.index or 0], _seed(_bytes(state["cuda"]), repeats))
        )
    # Not torch.manual_seed, which would seed every device.
    own.append((torch.default_generator, _seed(_bytes(state["torch"]), repeats)))
    for generator, seed in own:
        generator.manual_seed(seed)
    random.seed(_seed(pickle.dumps(state["python"]), repeats))
    kind = getattr(np.random, state["numpy"]["bit_generator"])
    np.random.set_state(kind(_seed(pickle.dumps(state["numpy"]), repeats)).state)


def _bytes(state: torch.Tensor) -> bytes:
    return state.cpu().numpy().tobytes()


def _seed(state: bytes, repeats: int) -> int:
    """A seed below 2**63 that is another for every state and number."""
    digest = hashlib.blake2b(state + repeats.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

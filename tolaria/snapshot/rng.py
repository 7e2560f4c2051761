"""The random generators that a capture covers, and what they draw after a restore."""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Generators:
    """Those of the process and of a device, and more of one's own; or none at all."""

    device: torch.device
    own: Sequence[torch.Generator] = ()
    """Beside the default ones."""
    are_covered: bool = False
    """Whether a restore puts them back."""

    def names(self) -> tuple[str, ...]:
        """What is covered, in words."""
        if not self.are_covered:
            return ()
        device = (f"torch.{self.device}",) if self.device.type == "cuda" else ()
        own = (f"generator[{i}]" for i in range(len(self.own)))
        return ("torch.cpu", *device, "python.random", "numpy.random", *own)

    def state(self) -> dict[str, Any]:
        """The state of every one of them: a run that is resumed needs it, covered or not."""
        state: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "generators": [g.get_state() for g in self.own],
        }
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load(self, state: dict[str, Any], repeats: int) -> None:
        """Put them back to :meth:`state`, whether they are covered or not.

        Args:
            state: what :meth:`state` returned.
            repeats: how often this state was put back before. At 0 the draws are those that followed the
                capture. Else every generator is seeded anew from its captured state and this number: the
                same draws would lead to the same bad batch again. Merely to move it on would not do, since
                draws that are shifted by a few numbers are nearly the same batch.
        """
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        for generator, own in zip(self.own, state["generators"], strict=True):
            generator.set_state(own)
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)
        if repeats:
            self._seed_anew(state, repeats)

    def _seed_anew(self, state: dict[str, Any], repeats: int) -> None:
        seeds = [(g, _seed(_bytes(s), repeats)) for g, s in zip(self.own, state["generators"], strict=True)]
        if "cuda" in state:
            default = torch.cuda.default_generators[self.device.index or 0]
            seeds.append((default, _seed(_bytes(state["cuda"]), repeats)))
        # Not torch.manual_seed, which would seed every device.
        seeds.append((torch.default_generator, _seed(_bytes(state["torch"]), repeats)))
        for generator, seed in seeds:
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

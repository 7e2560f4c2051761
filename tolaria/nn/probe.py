"""Trying out a seed before it is grafted: does it fit, does it write into its input, does it roll dice?"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tolaria.nn.randomness import StreamName, preserve_random_state, random_state, streams_drawn


@dataclass(frozen=True, slots=True)
class SeedTraits:
    """What a seed does beside computing its output."""

    mutates_input: bool = False
    """It changes its input in place, so it is given a copy."""
    streams: frozenset[StreamName] = frozenset()
    """The global random streams that its forward draws from."""
    is_identity: bool = False
    """At birth, in eval mode, it returned its input bit for bit."""


def probe_seed(seed: nn.Module, features: Tensor, *, where: str) -> SeedTraits:
    """Run ``seed`` on stand-ins for ``features`` and check what comes out.

    The real seed runs once, in eval mode; its train mode is tried on a copy, so that running statistics stay
    as initialised. Every random stream is left as found.

    Args:
        seed: the module to try.
        features: example features; batches of one are doubled, since normalisation over a single value is an
            error.
        where: how an error names the place.

    Raises:
        TypeError: the output is not a tensor.  ValueError: its shape, dtype or device is not that of its
            input, or the forward raised.
    """
    probe = _stand_in(features)
    with preserve_random_state(), torch.no_grad():
        was_training = seed.training
        seed.eval()
        born = _check_output(_try(seed, probe.clone(), where), probe, where)
        is_identity = torch.equal(born, probe)
        seed.train(was_training)
        trial = copy.deepcopy(seed).train()
        given, before = probe.clone(memory_format=torch.preserve_format), random_state()
        version = given._version
        _check_output(_try(trial, given, where), probe, where)
        mutates = given._version != version or not torch.equal(given, probe)
        return SeedTraits(mutates, streams_drawn(before), is_identity)


def _try(seed: nn.Module, features: Tensor, where: str) -> object:
    try:
        return seed(features)
    except Exception as error:
        raise ValueError(
            f"{where}: expected a seed that takes features of shape {tuple(features.shape)}, its forward "
            f"raised {type(error).__name__}: {error}"
        ) from error


def _stand_in(features: Tensor) -> Tensor:
    """Finite values in the shape, dtype, device and memory format of ``features``; draws no random number."""
    like = features.detach()
    if like.dim() > 1 and like.shape[0] == 1:
        like = like.expand(2, *like.shape[1:]).clone(memory_format=torch.preserve_format)
    values = torch.arange(like.numel(), device=like.device, dtype=torch.float64).mul(0.7).sin()
    return torch.empty_like(like).copy_(values.view(like.shape))


def _check_output(output: object, probe: Tensor, where: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"{where}: expected the seed to return a tensor, got {type(output).__name__}")
    for what, got, expected in (
        ("shape", tuple(output.shape), tuple(probe.shape)),
        ("dtype", output.dtype, probe.dtype),
        ("device", output.device, probe.device),
    ):
        if got != expected:
            raise ValueError(
                f"{where}: expected a seed that keeps the {what} of its features, {expected}, got {got}"
            )
    return output

"""Trying out a seed before it is grafted: does it fit, does it write into its input, does it roll dice?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tolaria.nn.randomness import StreamName, preserve_random_state, random_state, streams_drawn

_GROUP_NORMS = (F.group_norm, torch.group_norm, torch.native_group_norm)


@dataclass(frozen=True, slots=True)
class SeedTraits:
    """What a seed does beside computing its output."""

    mutates_input: bool = False
    """It changes its input in place, so it is given a copy."""
    streams: frozenset[StreamName] = frozenset()
    """The global random streams that its forward draws from."""
    is_identity: bool = False
    """At birth, in eval mode, it returned its input bit for bit."""
    needs_contiguous: bool = False
    """It group-normalises channels_last features that want no gradient: torch's backward of that crashes."""


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
    needs_contiguous = _crashes_backward(seed, probe)
    if needs_contiguous:
        probe = probe.contiguous()
        seed.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
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
        return SeedTraits(mutates, streams_drawn(before), is_identity, needs_contiguous)


class _GroupNorms(TorchFunctionMode):
    """Notes whether the backward of a group norm would end the process.

    That of torch (2.9 to 2.14) writes through a null pointer where its input is channels_last and wants no
    gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.crashes = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        named = dict(kwargs or {})
        if func in _GROUP_NORMS:
            given = args[0] if args else named.get("input")
            if isinstance(given, Tensor) and not given.requires_grad and not given.is_contiguous():
                self.crashes = True
        return func(*args, **named)


def _crashes_backward(seed: nn.Module, probe: Tensor) -> bool:
    """Whether torch's backward would crash if features like ``probe`` came in channels_last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if probe.dim() not in formats:
        return False
    given = probe.clone(memory_format=formats[probe.dim()])
    with preserve_random_state(), torch.enable_grad(), _GroupNorms() as norms:
        try:
            copy.deepcopy(seed).train()(given)
        except Exception:  # (a seed need not take this layout; what it is for is tried below)
            return bool(norms.crashes)
    return bool(norms.crashes)


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

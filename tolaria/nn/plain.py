"""A grown network as an ordinary one: fossils become submodules, slots go."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tolaria.nn.features import features_of
from tolaria.nn.slot import SeedSlot
from tolaria.nn.stage import SeedStage


class Grown(nn.Module):
    """A module and the seed that grew behind it; what is asked of it beside that is asked of the module.

    Args:
        host: its output, or the first of a tuple, is what the seed reads.
        seed: keeps the shape of the features.
        name: of the slot, for errors.
    """

    def __init__(self, host: nn.Module, seed: nn.Module, name: str) -> None:
        super().__init__()
        self.host, self.seed, self._name = host, seed, name

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (whatever the module takes and returns)
        """The module's output with the seed's in place of its features."""
        output = self.host(*args, **kwargs)
        features = features_of(output, self._name)
        grown = self.seed(features)
        if not isinstance(output, tuple):
            return grown
        changed = (grown, *output[1:])
        return type(output)(*changed) if hasattr(output, "_fields") else changed

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("host"), name)


class Prepared(nn.Module):
    """A seed that needs its features prepared, or whose dtype follows them under autocast."""

    def __init__(self, seed: nn.Module, *, copies: bool, contiguous: bool) -> None:
        super().__init__()
        self.seed, self._copies, self._contiguous = seed, copies, contiguous

    def forward(self, features: Tensor) -> Tensor:
        """Features to features of the same shape and dtype."""
        given = features.contiguous() if self._contiguous else features
        grown: Tensor = self.seed(given.clone() if self._copies else given)
        return grown.to(features.dtype)


def to_plain(host: nn.Module, slots: Mapping[str, SeedSlot], paths: Mapping[str, str]) -> nn.Module:
    """See :meth:`MorphogeneticModel.to_plain`.

    Args:
        host: whose hooks the slots are.
        slots: every slot by name.
        paths: the submodule of the host behind which a slot lies; none for a slot that is the host's own.

    Raises:
        ValueError: a seed is BLENDING.
    """
    blending = [name for name, slot in slots.items() if slot.stage is SeedStage.BLENDING]
    if blending:
        raise ValueError(
            f"to_plain: expected seeds that are fossilized or do not count yet, got {blending} in BLENDING; "
            "fossilize or cull them first"
        )
    plain, held = copy.deepcopy((host, dict(slots)))  # together: the hooks go on to point at these slots
    for name, slot in held.items():
        seed = _seed_of(slot)
        if name not in paths:
            plain = _replaced(plain, slot, nn.Identity() if seed is None else seed)
            continue
        beside = _without_hooks_of(plain, slot)
        if seed is not None:
            plain = _replaced(plain, beside, Grown(beside, seed, name))
    return plain


def _seed_of(slot: SeedSlot) -> nn.Module | None:
    """What the slot's seed computes, if it counts."""
    if slot.seed is None or slot.stage is not SeedStage.FOSSILIZED:
        return None
    return Prepared(slot.seed, copies=slot.traits.mutates_input, contiguous=slot.traits.needs_contiguous)


def _without_hooks_of(root: nn.Module, slot: SeedSlot) -> nn.Module:
    """The module behind which ``slot`` lies, without it; a seed of another slot there stays inside."""
    for module in root.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__self__", None) is slot:
                del module._forward_hooks[key]
                return _outermost(root, module)
    raise AssertionError("a slot with a path is a hook of a module")


def _outermost(root: nn.Module, module: nn.Module) -> nn.Module:
    """``module``, or what stands in its place with a seed of a slot behind the same one."""
    around = {id(m.host): m for m in root.modules() if isinstance(m, Grown)}
    while id(module) in around:
        module = around[id(module)]
    return module


def _replaced(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """``root`` with ``new`` wherever ``old`` was."""
    if root is old:
        return new
    for module in list(root.modules()):
        for name, child in module._modules.items():
            if child is old and module is not new:
                module._modules[name] = new
    return root

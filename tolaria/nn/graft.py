"""Seed slots on a module that stays what it is: its class, its forward's signature, its parameters' names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tolaria.nn.model import MorphogeneticModel, slot_paths
from tolaria.nn.nest import Inputs, check_inputs
from tolaria.nn.slot import SeedSlot
from tolaria.nn.stage import SeedStage
from tolaria.nn.structure import check_structure

ATTRIBUTE = "seed_slots"
"""The child of the host that holds its slots."""
_EMPTY = (SeedStage.DORMANT, SeedStage.CULLED)


def graft(
    host: nn.Module,
    slots: Sequence[str] | Mapping[str, str] | None = None,
    *,
    example_input: Inputs | None = None,
) -> MorphogeneticModel:
    """Put seed slots on ``host`` in place, for loops and trainers that look at the model they are given.

    The host's class, forward and parameter names stay; it gets a child ``seed_slots`` and forward hooks. Its
    ``state_dict`` carries the seeds and what is known of them (as a uint8 tensor), ``load_state_dict`` of a
    host grafted at the same places regrows them, and takes one from before the graft, too. Train, save and
    load the host; grow it by what is returned. Optimizers are to be made after a load that regrows.

    Args:
        host: the module; grafted once. To get hold of it again, after a deep copy say, leave ``slots`` out.
        slots: as for :class:`MorphogeneticModel`.
        example_input: likewise; a host that is to be regrown needs it here.

    Returns:
        A handle with ``germinate``, ``incubate``, ``blend``, ``fossilize``, ``cull`` and so on.

    Raises:
        ValueError: a slot that the host does not have, a bad name, none at all, or it is grafted already.
        TypeError: ``host`` is not a module, or another argument is of the wrong type.
    """
    if not isinstance(host, nn.Module):
        raise TypeError(f"graft: host: expected an nn.Module, got {type(host).__name__}")
    held = getattr(host, ATTRIBUTE, None)
    if isinstance(held, _HeldSlots):
        if slots is not None:
            raise ValueError(
                f"graft: host: it is grafted already, at {held.paths}; leave slots out to get hold of it"
            )
        if example_input is not None:
            check_inputs("graft: example_input", example_input)
            held.example_input = example_input
        return _Handle(host, held)
    if held is not None:
        raise ValueError(f"graft: host: expected a module without an attribute {ATTRIBUTE!r} of its own")
    if any(isinstance(module, SeedSlot) for module in host.modules()):
        raise ValueError("graft: host: it holds SeedSlot modules; wrap it in a MorphogeneticModel")
    paths = slot_paths(host, slots, has_own=False)
    if example_input is not None:
        check_inputs("graft: example_input", example_input)
    held = _HeldSlots(paths, example_input)
    device = next((p.device for p in host.parameters()), None)
    if device is not None:
        held.to(device)
    for name, path in paths.items():
        host.get_submodule(path).register_forward_hook(held.slot(name).inject)
    held.train(host.training)
    host.add_module(ATTRIBUTE, held)
    host.register_load_state_dict_pre_hook(held.before_load)  # type: ignore[no-untyped-call]
    return _Handle(host, held)


class _Handle(MorphogeneticModel):
    """Grows a module that holds its own slots."""

    def __init__(self, host: nn.Module, held: _HeldSlots) -> None:
        nn.Module.__init__(self)
        self.host = host
        self._paths = held.paths
        self.example_input = held.example_input


class _HeldSlots(nn.ModuleDict):
    """The slots of a host, as its child; a state_dict says what is needed to regrow them."""

    def __init__(self, paths: dict[str, str], example_input: Inputs | None) -> None:
        super().__init__({name: SeedSlot(name) for name in paths})
        self.paths = paths
        self.example_input = example_input

    def slot(self, name: str) -> SeedSlot:
        """The slot of that name."""
        return cast(SeedSlot, self[name])

    def get_extra_state(self) -> Tensor:
        """The structure as JSON in a uint8 tensor, which every format of checkpoints can hold."""
        text = json.dumps({name: self.slot(name).structure() for name in self.paths})
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).clone()

    def set_extra_state(self, state: object) -> None:
        """Nothing: the seeds were regrown before their values were loaded."""

    def before_load(self, host: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
        """Regrow what a state_dict that is about to be loaded describes.

        Raises:
            ValueError: it describes slots that are not there, a field is wrong, or a seed came from a
                callable and is not in place. Nothing has changed then.
        """
        start = f"{prefix}{ATTRIBUTE}."
        if not any(key.startswith(start) for key in state):
            if all(self.slot(name).stage in _EMPTY for name in self.paths):  # it is from before the graft
                state.update((start + key, value) for key, value in self.state_dict().items())
            return
        if f"{start}_extra_state" not in state:
            return  # what is missing is named by the load
        structure = _read(state[f"{start}_extra_state"])
        unknown = sorted(set(structure) - set(self.paths))
        if unknown:
            raise ValueError(
                f"load_state_dict: {ATTRIBUTE}: expected slots {list(self.paths)}, got {unknown}"
            )
        for name, description in structure.items():
            if not _is_in_place(self.slot(name), description):
                check_structure(name, description)
        handle = graft(host)
        for name, description in structure.items():
            slot = self.slot(name)
            if _is_in_place(slot, description):
                slot.return_to(description)
                continue
            is_empty = SeedStage(description["stage"]) in _EMPTY
            features = torch.empty(0) if is_empty else handle.features_at(name)
            slot.clear()
            slot.load_structure(description, features)


def _read(saved: object) -> dict[str, Any]:
    what = f"a {type(saved).__name__}"
    if isinstance(saved, Tensor):
        try:
            found = json.loads(bytes(saved.to("cpu", torch.uint8).flatten().tolist()))
        except ValueError as error:
            what = str(error)
        else:
            if isinstance(found, dict):
                return found
            what = f"a {type(found).__name__}"
    raise ValueError(
        f"load_state_dict: {ATTRIBUTE}._extra_state: expected what a grafted host has saved, got {what}"
    )


def _is_in_place(slot: SeedSlot, description: object) -> bool:
    """Whether the seed that is described is the one that grows there, so that it need not be rebuilt."""
    if slot.seed is None or not isinstance(description, Mapping):
        return False
    mine = slot.structure()
    return all(
        description.get(key) == mine[key] for key in ("blueprint", "options", "rng_seed", "generation")
    )

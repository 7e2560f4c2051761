"""A host that can grow: seed slots at its injection points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tolaria.nn.features import features_of
from tolaria.nn.nest import Inputs, call_with, check_inputs, to_device
from tolaria.nn.plain import to_plain
from tolaria.nn.randomness import preserve_random_state
from tolaria.nn.schedule import AlphaSchedule, ScheduleKind
from tolaria.nn.slot import SeedFactory, SeedSlot
from tolaria.nn.stage import SeedStage
from tolaria.nn.structure import check_structure, seed_numel


class MorphogeneticModel(nn.Module):
    """Wraps any host module and puts a :class:`SeedSlot` behind each of its injection points.

    The host is left as it is (its parameter names stay, under ``host.``); the slots are forward hooks on its
    submodules. A host that holds :class:`SeedSlot` modules of its own may be wrapped, too: they are found.

    Args:
        host: the module to grow; its forward is this module's.
        slots: where seeds may go: names from ``host.injection_points``, or a mapping from a name to the path
            of a submodule of the host (``{"mid": "layer2"}``); all of ``host.injection_points`` if None.
        example_input: an input of the host, batch first, from which :meth:`germinate` learns the shape of the
            features; its values do not matter. A tensor, a tuple of positional or a mapping of keyword
            arguments. May also be given at each germination.

    Raises:
        ValueError: a slot that the host does not have, a bad name, or none at all.
        TypeError: ``host`` is not a module, ``slots`` neither names nor a mapping, or ``example_input`` is
            nothing that a model is called with.
    """

    def __init__(
        self,
        host: nn.Module,
        slots: Sequence[str] | Mapping[str, str] | None = None,
        *,
        example_input: Inputs | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(host, nn.Module):
            raise TypeError(f"MorphogeneticModel: host: expected an nn.Module, got {type(host).__name__}")
        own = [m.name for m in host.modules() if isinstance(m, SeedSlot)]
        paths = slot_paths(host, slots, has_own=bool(own))
        twice = sorted({name for name in own if own.count(name) > 1 or name in paths})
        if twice:
            raise ValueError(
                f"slots: expected each name once, got {twice} more than once; rename the host's own"
            )
        self.host = host
        self._paths = paths
        if example_input is not None:
            check_inputs("MorphogeneticModel: example_input", example_input)
        self.example_input = example_input
        device = next((p.device for p in host.parameters()), None)
        with torch.device(device) if device is not None else nullcontext():  # whatever the default is
            self.seed_slots = nn.ModuleDict({name: SeedSlot(name) for name in paths})
        for name, path in paths.items():
            slot = self.seed_slots[name]
            assert isinstance(slot, SeedSlot)
            host.get_submodule(path).register_forward_hook(slot.inject)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (whatever the host takes and returns)
        """The host's forward, seeds included."""
        return self.host(*args, **kwargs)

    # ------------------------------------------------------------------ what there is

    @property
    def slots(self) -> dict[str, SeedSlot]:
        """Every slot by name."""
        return {m.name: m for m in self.modules() if isinstance(m, SeedSlot)}

    def slot(self, name: str) -> SeedSlot:
        """The slot called ``name``.

        Raises:
            ValueError: no such slot; the message lists those there are.
        """
        slots = self.slots
        if name not in slots:
            raise ValueError(f"slot: expected one of {', '.join(sorted(slots))}, got {name!r}")
        return slots[name]

    def seed_parameters(self, slot: str | None = None) -> list[nn.Parameter]:
        """Parameters of the seed in ``slot``, or of every seed."""
        slots = self.slots.values() if slot is None else [self.slot(slot)]
        return [p for each in slots for p in each.parameters()]

    def host_parameters(self) -> list[nn.Parameter]:
        """Every parameter that belongs to no seed."""
        seeds = {id(p) for p in self.seed_parameters()}
        return [p for p in self.parameters() if id(p) not in seeds]

    # ------------------------------------------------------------------ the life of a seed

    def germinate(
        self,
        slot: str,
        blueprint: str | SeedFactory,
        *,
        example_input: Inputs | None = None,
        rng_seed: int | None = None,
        options: Mapping[str, object] | None = None,
    ) -> SeedSlot:
        """Graft a seed; see :meth:`SeedSlot.germinate`. Random streams, modes and buffers are left as found.

        Args:
            slot: which slot.
            blueprint: a registered name or a callable that builds a seed for given features.
            example_input: an input of the host; that of the constructor if None.
            rng_seed: seeds the new module.
            options: keyword arguments for the blueprint.

        Returns:
            The slot, in stage GERMINATED.

        Raises:
            ValueError: unknown slot or blueprint, no example input, or a seed that does not fit.
            IllegalTransitionError: the slot holds a seed already.
        """
        chosen = self.slot(slot)
        features = self.features_at(slot, example_input)
        chosen.germinate(blueprint, features, rng_seed=rng_seed, options=options)
        return chosen

    def advance(self, slot: str, stage: SeedStage, *, blend_steps: int | None = None) -> SeedSlot:
        """Take the seed in ``slot`` to ``stage``; see :meth:`SeedSlot.advance`."""
        chosen = self.slot(slot)
        chosen.advance(stage, blend_steps=blend_steps)
        return chosen

    def incubate(self, slot: str) -> SeedSlot:
        """GERMINATED -> TRAINING."""
        chosen = self.slot(slot)
        chosen.start_training()
        return chosen

    def blend(
        self, slot: str, steps: int, kind: ScheduleKind = "cosine", *, target: float = 1.0
    ) -> AlphaSchedule:
        """TRAINING -> BLENDING; returns the schedule that raises alpha to ``target``."""
        return self.slot(slot).start_blending(steps, kind, end=target)

    def ramp(self, slot: str, target: float, steps: int, kind: ScheduleKind = "cosine") -> AlphaSchedule:
        """While BLENDING: alpha goes from where it is to ``target``; see :meth:`SeedSlot.ramp`."""
        return self.slot(slot).ramp(target, steps, kind)

    def fossilize(self, slot: str) -> SeedSlot:
        """BLENDING -> FOSSILIZED."""
        chosen = self.slot(slot)
        chosen.fossilize()
        return chosen

    def cull(self, slot: str) -> SeedSlot:
        """Take the seed in ``slot`` out."""
        chosen = self.slot(slot)
        chosen.cull()
        return chosen

    def to_plain(self) -> nn.Module:
        """The network as it is now as an ordinary module without slots.

        A copy; this model stays as it is. A fossil stands behind the host's submodule in a module that holds
        both (``stages.0`` becomes ``stages.0.host`` and ``stages.0.seed``); a seed that incubates is left
        out, since it does not count. Outputs are equal bit for bit in eval mode, and in train mode, too,
        unless a seed rolls dice: those come from the global stream then.

        Raises:
            ValueError: a seed is BLENDING.
        """
        return to_plain(self.host, self.slots, self._paths)

    # ------------------------------------------------------------------ saving

    def structure(self) -> dict[str, object]:
        """Which seeds are where, as JSON values; with the state_dict it is everything that the model is."""
        return {name: slot.structure() for name, slot in self.slots.items()}

    def slot_paths(self) -> dict[str, str | None]:
        """Every slot's submodule of the host, by the slot's name; None for a slot that is the host's own."""
        return {name: self._paths.get(name) for name in self.slots}

    def load_structure(self, structure: Mapping[str, Any]) -> None:
        """Grow this model into the shape that :meth:`structure` described; then load the state_dict.

        Raises:
            ValueError: a slot is unknown, a field is wrong, or a seed cannot be rebuilt by name.
        """
        for name, description in structure.items():
            check_structure(self.slot(name).name, description)
        for name, description in structure.items():
            self.slot(name).load_structure(description, self.features_at(name))

    def structure_numel(self, structure: Mapping[str, Any]) -> int:
        """Elements of the seeds that :meth:`load_structure` would graft; no memory is taken for them.

        Raises:
            ValueError, TypeError: as :meth:`load_structure`.
        """
        total = 0
        for name, description in structure.items():
            check_structure(self.slot(name).name, description)
            if description["blueprint"] is not None:
                total += seed_numel(name, description, self.features_at(name))
        return total

    # ------------------------------------------------------------------ probing

    def features_at(self, slot: str, example_input: Inputs | None = None) -> Tensor:
        """What flows through ``slot`` for an example input; model and process are left as found.

        Raises:
            ValueError: no example input is known, or the slot was not reached.
            TypeError: the example is nothing that a model is called with, or what flows there is no tensor.
        """
        chosen = self.slot(slot)
        example = example_input if example_input is not None else self.example_input
        if example is None:
            raise ValueError(
                f"germinate: slot {slot!r}: expected an example input to learn the features' shape "
                "from, got None; "
                "pass example_input= here or to MorphogeneticModel"
            )
        check_inputs("germinate: example_input", example)
        device = chosen.alpha.device
        seen: list[Tensor] = []

        def look(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            seen.append(features_of(output, slot).detach())

        def look_before(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = args[0] if args else next(iter(named.values()), None)
            if not isinstance(given, Tensor):
                raise TypeError(f"slot {slot!r}: expected features as a tensor, got {type(given).__name__}")
            seen.append(given.detach())

        if slot in self._paths:
            handle = self.host.get_submodule(self._paths[slot]).register_forward_hook(look, prepend=True)
        else:
            handle = chosen.register_forward_pre_hook(look_before, with_kwargs=True)
        try:
            with _undisturbed(self), torch.autocast(device.type, enabled=False):
                call_with(self, to_device(example, device))
        finally:
            handle.remove()
        if not seen:
            raise ValueError(
                f"germinate: slot {slot!r}: expected the forward to pass its injection point, it did not"
            )
        return seen[0]


def slot_paths(
    host: nn.Module, slots: Sequence[str] | Mapping[str, str] | None, has_own: bool
) -> dict[str, str]:
    """Slot name to submodule path, checked."""
    points: Mapping[str, str] = getattr(host, "injection_points", {})
    if isinstance(slots, str):
        slots = [slots]
    if slots is None:
        paths = dict(points)
    elif isinstance(slots, Mapping):
        paths = dict(slots)
    elif not isinstance(slots, Sequence):
        raise TypeError(
            f"slots: expected names, or a mapping from name to submodule path, got {type(slots).__name__}"
        )
    else:
        unknown = [name for name in slots if name not in points]
        if unknown:
            there = ", ".join(points) or "none; give a mapping such as {'mid': 'layer2'}"
            raise ValueError(
                f"slots: expected injection points of {type(host).__name__} ({there}), got {unknown}"
            )
        twice = sorted({name for name in slots if list(slots).count(name) > 1})
        if twice:
            raise ValueError(f"slots: expected each injection point once, got {twice} more than once")
        paths = {name: points[name] for name in slots}
    modules = dict(host.named_modules())
    for name, path in paths.items():
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(
                f"slots: expected a name without dots, got {name!r}; use a mapping from name to path"
            )
        if path not in modules:
            raise ValueError(f"slots: {name!r}: expected the path of a submodule of the host, got {path!r}")
    if not paths and not has_own:
        raise ValueError(
            f"slots: expected at least one injection point, got none; "
            f"{type(host).__name__} lists no injection_points, "
            "so give a mapping such as {'mid': 'layer2'}"
        )
    return paths


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Forwards in here run in eval mode without gradients; modes, buffers and random streams are put back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    try:
        with preserve_random_state(), torch.no_grad():
            for module, _ in modes:
                module.training = False
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, version, kept in buffers:
            if buffer._version != version:
                buffer.copy_(kept)

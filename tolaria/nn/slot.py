"""Seed slots: where a seed is grafted onto a host, and what each stage of its life does to the features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tolaria import ops
from tolaria._fossils import tell_fossilized
from tolaria.nn.features import features_of, with_strides_of
from tolaria.nn.probe import SeedTraits, probe_seed
from tolaria.nn.randomness import RandomStream, check_rng_seed, derive_seed, preserve_random_state
from tolaria.nn.schedule import AlphaSchedule, ScheduleKind
from tolaria.nn.seeds import build_seed
from tolaria.nn.slot_state import SlotState
from tolaria.nn.stage import IllegalTransitionError, SeedStage, check_transition
from tolaria.nn.structure import check_structure

SeedFactory = Callable[[Tensor], nn.Module]
"""Builds a seed for features like the given ones (values are meaningless; shape, dtype and device count)."""

_NEARLY_ONE = 0.95


class SeedSlot(SlotState):
    """An injection point: features in, features out, with at most one seed between them.

    What it computes is set by its stage:

    * DORMANT, GERMINATED, CULLED: the features themselves.
    * TRAINING: ``ops.straight_through(features, seed(features.detach()))``: the host's values and gradients
      are what they would be without the seed, and the seed receives the gradient that its output would
      receive in their place.
    * BLENDING: ``ops.blend(features, seed(ops.seed_gate(features, alpha)), alpha)``.
    * FOSSILIZED: the seed's output (on CUDA through the blend, so that a rollback that the device decides
      takes effect there at once).

    Args:
        name: how errors and events call this slot.

    Attributes:
        alpha: 0-dim float32 buffer, the seed's weight; it keeps its address and its dtype.
        stage: a :class:`SeedStage`, read-only; see :meth:`advance`.
        seed: the grafted module, or None.
        generation: how many seeds this slot has seen.
        blueprint: registered name of the seed's blueprint, or None for a seed that came from a callable.
    """

    # ------------------------------------------------------------------ forward

    def forward(self, features: Tensor) -> Tensor:
        """Features of any floating dtype and shape to features of the same shape and dtype."""
        stage, seed = self._stage, self.seed
        if seed is None or stage is SeedStage.GERMINATED:
            return features
        if stage is SeedStage.TRAINING:
            if not torch.is_grad_enabled():  # nobody can learn from it, and the host's values pass anyway
                return features
            beside = ops.straight_through(features, self._run(seed, features.detach()))
            return with_strides_of(features, beside)
        if self._shares is not None:
            return self._by_sample(seed, features, self._shares)
        if stage is SeedStage.FOSSILIZED and not features.is_cuda:
            return self._run(seed, features).to(features.dtype)  # which may differ under autocast
        grown = self._run(seed, ops.seed_gate(features, self.alpha))
        return ops.blend(features, grown, self.alpha)

    def inject(self, module: nn.Module, args: object, output: object) -> object:
        """Forward hook of a host's submodule: its output (of a tuple, the first) goes through the slot."""
        if self.seed is None or self._stage is SeedStage.GERMINATED:
            return None
        features = features_of(output, self.name)
        if not isinstance(output, tuple):
            return self(features)
        changed = (self(features), *output[1:])
        return type(output)(*changed) if hasattr(output, "_fields") else changed

    def _run(self, seed: nn.Module, features: Tensor) -> Tensor:
        if self._traits.needs_contiguous:
            features = features.contiguous()
        if self._traits.mutates_input:
            features = features.clone()
        if self._stream is None:
            return seed(features)  # type: ignore[no-any-return]
        with self._stream.swapped_in():
            return seed(features)  # type: ignore[no-any-return]

    def _by_sample(self, seed: nn.Module, features: Tensor, shares: Tensor) -> Tensor:
        if not features.dim() or features.shape[0] != shares.shape[0]:
            raise ValueError(
                f"slot {self.name!r}: expected features whose first dimension is the batch of "
                f"{shares.shape[0]}, got shape {tuple(features.shape)}"
            )
        alpha = (self.alpha * shares).view(-1, *[1] * (features.dim() - 1))
        return ops.blend(features, self._run(seed, features), alpha)

    @contextmanager
    def shared(self, shares: Tensor) -> Iterator[None]:
        """Inside, each sample of a batch has its own share of alpha (to measure what the seed contributes).

        Args:
            shares: (B,) float32, 0 to 1; at 0 a sample passes as if there were no seed, bit for bit.
        """
        self._shares = shares
        try:
            yield
        finally:
            self._shares = None

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Inside, the features pass as if there were no seed (to measure what it contributes)."""
        stage = self._stage
        self._stage = SeedStage.GERMINATED if self.seed is not None else stage
        try:
            yield
        finally:
            self._stage = stage

    # ------------------------------------------------------------------ life

    @property
    def born_as_identity(self) -> bool:
        """Whether the seed gave example features back bit for bit when it was grafted."""
        return self._traits.is_identity

    @property
    def traits(self) -> SeedTraits:
        """What the seed does beside computing its output."""
        return self._traits

    @property
    def is_active(self) -> bool:
        """Whether a seed is in place."""
        return self.seed is not None

    def germinate(
        self,
        blueprint: str | SeedFactory,
        features: Tensor,
        *,
        rng_seed: int | None = None,
        options: Mapping[str, object] | None = None,
    ) -> nn.Module:
        """Put a new seed in place (DORMANT or CULLED -> GERMINATED).

        The seed is built from a random stream of its own and tried out on ``features``; every random stream
        of the process is left as found, and nothing changes if it does not fit.

        Args:
            blueprint: a registered name (see ``tolaria.nn.seeds``) or a callable that builds a seed for
                features.
            features: an example of what flows through the slot; shape, dtype, device and memory format count.
            rng_seed: seeds the initialisation and the seed's own random stream; derived from the process's
                initial torch seed, the slot's name and the generation if None.
            options: keyword arguments for the blueprint.

        Returns:
            The seed.

        Raises:
            IllegalTransitionError: a seed is in place already.
            ValueError: unknown blueprint, or the seed does not keep shape, dtype or device.
            TypeError: the blueprint did not build a module, or the seed does not return a tensor.
        """
        check_transition(self.name, self._stage, SeedStage.GERMINATED)
        check_rng_seed(rng_seed)
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"slot {self.name!r}: features: expected a floating point tensor, got {got}")
        chosen = derive_seed(self.name, self.generation) if rng_seed is None else int(rng_seed)
        if options is not None and not isinstance(options, Mapping):
            raise TypeError(f"slot {self.name!r}: options: expected a mapping or None, got {options!r}")
        settings = dict(options or {})
        with preserve_random_state():
            seed = build_seed(
                blueprint, features, rng_seed=chosen, options=settings, where=f"slot {self.name!r}"
            )
            traits = probe_seed(seed, features, where=f"slot {self.name!r}")
        seed.train(self.training)
        self.seed, self._traits = seed, traits
        self._stream = RandomStream(traits.streams, chosen) if traits.streams else None
        self.blueprint = blueprint if isinstance(blueprint, str) else None
        self.options, self.rng_seed = settings, chosen
        self.generation += 1
        self._set_alpha(0.0, limit=1.0)
        self._stage = SeedStage.GERMINATED
        return seed

    def start_training(self) -> None:
        """GERMINATED -> TRAINING: incubation begins."""
        check_transition(self.name, self._stage, SeedStage.TRAINING)
        self._stage = SeedStage.TRAINING

    def start_blending(
        self, steps: int, kind: ScheduleKind = "cosine", *, start: float = 0.0, end: float = 1.0
    ) -> AlphaSchedule:
        """TRAINING -> BLENDING: alpha goes from ``start`` to ``end`` in ``steps`` steps of the schedule."""
        check_transition(self.name, self._stage, SeedStage.BLENDING)
        schedule = self._schedule(steps, kind, start, end)
        self.schedule, self._stage = schedule, SeedStage.BLENDING
        return schedule

    def ramp(self, target: float, steps: int, kind: ScheduleKind = "cosine") -> AlphaSchedule:
        """While BLENDING: alpha goes from where it is to ``target`` over ``steps`` calls of what is returned.

        To 0 before a cull, so that the host does not lose the seed from one step to the next; or to a share
        at which the seed is to stay for a while. Reads alpha.

        Raises:
            IllegalTransitionError: the seed is in another stage.
            ValueError: ``target`` is no number from 0 to 1, or ``steps`` or ``kind`` is wrong.
        """
        if self._stage is not SeedStage.BLENDING:
            raise IllegalTransitionError(
                f"slot {self.name!r}: ramp: expected a seed in stage BLENDING, got {self._stage.name}"
            )
        if isinstance(target, bool) or not isinstance(target, int | float) or not 0.0 <= target <= 1.0:
            raise ValueError(
                f"slot {self.name!r}: ramp: target: expected a number from 0 to 1, got {target!r}"
            )
        now = min(1.0, max(0.0, float(self.alpha)))  # sync: a person or an agent steers
        self.schedule = self._schedule(steps, kind, now, float(target))
        return self.schedule

    def _schedule(self, steps: int, kind: ScheduleKind, start: float, end: float) -> AlphaSchedule:
        return AlphaSchedule(
            self.alpha, steps, kind, start=start, end=end,
            position=self.alpha_position, limit=self.alpha_limit,
        )  # fmt: skip

    def fossilize(self) -> None:
        """BLENDING -> FOSSILIZED: the seed is part of the network from now on, alpha is 1.

        A governor of the model orders a capture, after which a rollback keeps the seed. Below an alpha of
        0.95 the host has not learnt to live with all of the seed: the jump is a UserWarning. Reads alpha.
        """
        check_transition(self.name, self._stage, SeedStage.FOSSILIZED)
        alpha = float(self.alpha)  # sync: once in the life of a seed
        if alpha < _NEARLY_ONE:
            warnings.warn(
                f"slot {self.name!r}: fossilize: alpha jumps from {alpha:.3g} to 1; blend to the end first",
                UserWarning,
                stacklevel=2,
            )
        self._become_fossil()
        tell_fossilized(self)

    def _become_fossil(self) -> None:
        self._set_alpha(1.0, limit=1.0)
        self.schedule, self._stage = None, SeedStage.FOSSILIZED

    def cull(self) -> None:
        """GERMINATED, TRAINING or BLENDING -> CULLED: the seed is taken out, alpha is 0.

        From one step to the next; :meth:`ramp` to 0 before, if the host leans on it.
        """
        check_transition(self.name, self._stage, SeedStage.CULLED)
        self._drop(SeedStage.CULLED)

    def advance(
        self, target: SeedStage, *, blend_steps: int | None = None, kind: ScheduleKind = "cosine"
    ) -> None:
        """Go to ``target`` by the method made for it (except germination: see :meth:`germinate`).

        Raises:
            IllegalTransitionError: the transition is not allowed.
            ValueError: BLENDING without ``blend_steps``, or GERMINATED.
        """
        check_transition(self.name, self._stage, target)
        if target is SeedStage.GERMINATED:
            raise ValueError(
                f"slot {self.name!r}: advance: use germinate(blueprint, features) to graft a seed"
            )
        if target is SeedStage.BLENDING:
            if blend_steps is None:
                raise ValueError(f"slot {self.name!r}: advance: BLENDING needs blend_steps, got None")
            self.start_blending(blend_steps, kind)
        elif target is SeedStage.TRAINING:
            self.start_training()
        elif target is SeedStage.FOSSILIZED:
            self.fossilize()
        else:
            self._drop(target)

    # ------------------------------------------------------------------ saving

    def allows_alpha(self, alpha: float) -> bool:
        """Whether ``alpha`` is one that a slot in this stage can have."""
        if self._stage is SeedStage.BLENDING:
            return 0.0 <= alpha <= 1.0
        return alpha == (1.0 if self._stage is SeedStage.FOSSILIZED else 0.0)

    def structure(self, *, on_device: bool = False) -> dict[str, object]:
        """Stage, blueprint and schedule as JSON values: what a state_dict does not say.

        Args:
            on_device: leave the schedule's position a tensor, which nobody waits for.
        """
        return {
            "stage": self._stage.value,
            "blueprint": self.blueprint,
            "options": dict(self.options),
            "rng_seed": self.rng_seed,
            "generation": self.generation,
            "schedule": None if self.schedule is None else self.schedule.state_dict(on_device=on_device),
        }

    def load_structure(self, structure: Mapping[str, Any], features: Tensor) -> None:
        """Graft the seed that ``structure`` describes, at its stage; a state_dict then fills in the values.

        Args:
            structure: what :meth:`structure` returned.
            features: as for :meth:`germinate`.

        Raises:
            IllegalTransitionError: a seed is in place already.
            ValueError: the seed came from a callable and cannot be rebuilt by name, or a field is missing, of
                the wrong type or out of range. Nothing has changed then.
        """
        stage = check_structure(self.name, structure)
        if stage in (SeedStage.DORMANT, SeedStage.CULLED):
            if self.seed is not None:
                raise IllegalTransitionError(
                    f"slot {self.name!r}: load_structure: expected an empty slot, got a seed"
                )
            self._stage = stage
        else:
            self.germinate(
                structure["blueprint"], features, rng_seed=structure["rng_seed"], options=structure["options"]
            )
            self._resume(stage, structure["schedule"])
        self.generation = int(structure["generation"])

    def return_to(self, structure: Mapping[str, Any]) -> None:
        """Take the seed that is in place to the stage that ``structure`` describes for it.

        Args:
            structure: what :meth:`structure` returned of this very seed.

        Raises:
            ValueError: a field is wrong. Nothing has changed then.
        """
        named = {**structure, "blueprint": structure["blueprint"] or "", "generation": self.generation}
        stage = check_structure(self.name, named)
        self._stage, self.schedule = SeedStage.GERMINATED, None
        self._set_alpha(0.0, limit=1.0)
        self._resume(stage, structure["schedule"])

    def clear(self) -> None:
        """Take whatever is in place out, a fossil, too: another state is about to be loaded."""
        self._drop(SeedStage.DORMANT)

    def _resume(self, stage: SeedStage, schedule: Mapping[str, Any] | None) -> None:
        if stage is SeedStage.GERMINATED:
            return
        self.start_training()
        if stage is SeedStage.TRAINING:
            return
        settings = schedule or {"steps": 1, "kind": "linear", "start": 0.0, "end": 1.0}
        blending = self.start_blending(
            settings["steps"], settings["kind"], start=settings["start"], end=settings["end"]
        )
        if stage is SeedStage.FOSSILIZED:
            self._become_fossil()
        elif schedule is not None:
            blending.load_state_dict(schedule)

    def extra_repr(self) -> str:
        """Name, stage and blueprint."""
        return f"{self.name!r}, stage={self._stage.name}, blueprint={self.blueprint!r}"

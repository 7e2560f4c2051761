"""Seed slots: where a seed is grafted onto a host, and what each stage of its life does to the features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tolaria import ops
from tolaria.nn.features import features_of, with_strides_of
from tolaria.nn.probe import SeedTraits, probe_seed
from tolaria.nn.randomness import RandomStream, check_rng_seed, derive_seed, preserve_random_state
from tolaria.nn.schedule import AlphaSchedule, ScheduleKind
from tolaria.nn.seeds import build_seed
from tolaria.nn.stage import IllegalTransitionError, SeedStage, check_transition
from tolaria.nn.structure import check_structure

SeedFactory = Callable[[Tensor], nn.Module]
"""Builds a seed for features like the given ones (values are meaningless; shape, dtype and device count)."""

_OF_A_SEED = (
    "seed",
    "_stage",
    "schedule",
    "blueprint",
    "options",
    "rng_seed",
    "generation",
    "_traits",
    "_stream",
)


class SeedSlot(nn.Module):
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

    alpha: Tensor
    alpha_limit: Tensor
    alpha_position: Tensor

    def __init__(self, name: str = "slot") -> None:
        super().__init__()
        self.name = name
        self.seed: nn.Module | None = None
        self.blueprint: str | None = None
        self.options: dict[str, object] = {}
        self.rng_seed: int | None = None
        self.generation = 0
        self.schedule: AlphaSchedule | None = None
        self._stage = SeedStage.DORMANT
        self._traits = SeedTraits()
        self._stream: RandomStream | None = None
        self.register_buffer("alpha", torch.zeros((), dtype=torch.float32))
        # What a device-side rollback zeroes beside alpha, so that a schedule that still runs cannot raise it
        # again.
        self.register_buffer("alpha_limit", torch.ones((), dtype=torch.float32), persistent=False)
        self.register_buffer("alpha_position", torch.zeros((), dtype=torch.int64), persistent=False)

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
    def stage(self) -> SeedStage:
        """Where the seed stands."""
        return self._stage

    @property
    def born_as_identity(self) -> bool:
        """Whether the seed gave example features back bit for bit when it was grafted."""
        return self._traits.is_identity

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

    def start_blending(self, steps: int, kind: ScheduleKind = "cosine", *, end: float = 1.0) -> AlphaSchedule:
        """TRAINING -> BLENDING: alpha is 0 and rises to ``end`` over ``steps`` calls of what is returned."""
        check_transition(self.name, self._stage, SeedStage.BLENDING)
        schedule = AlphaSchedule(
            self.alpha, steps, kind, end=end, position=self.alpha_position, limit=self.alpha_limit
        )
        self.schedule, self._stage = schedule, SeedStage.BLENDING
        return schedule

    def fossilize(self) -> None:
        """BLENDING -> FOSSILIZED: the seed is part of the network from now on, alpha is 1."""
        check_transition(self.name, self._stage, SeedStage.FOSSILIZED)
        self._set_alpha(1.0, limit=1.0)
        self.schedule, self._stage = None, SeedStage.FOSSILIZED

    def cull(self) -> None:
        """GERMINATED, TRAINING or BLENDING -> CULLED: the seed is taken out, alpha is 0."""
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

    def _drop(self, stage: SeedStage) -> None:
        self.seed, self._stream, self.schedule = None, None, None
        self._traits = SeedTraits()
        self.blueprint, self.options, self.rng_seed = None, {}, None
        self._set_alpha(0.0, limit=1.0)
        self._stage = stage

    def _set_alpha(self, value: float, *, limit: float) -> None:
        self.alpha.fill_(value)
        self.alpha_limit.fill_(limit)
        self.alpha_position.zero_()

    # ------------------------------------------------------------------ rollback protocol (see
    # tolaria.governor)

    def rollback_state(self) -> dict[str, object]:
        """What a snapshot keeps of this slot beside its tensors."""
        return {
            "stage": self._stage,
            "generation": self.generation,
            "stream": self._stream.state() if self._stream is not None else None,
            "seed": {name: getattr(self, name) for name in _OF_A_SEED},
        }

    def load_rollback_state(self, captured: dict[str, object] | None, *, keep_seed: bool = False) -> None:
        """Follow a restore of the tensors: a seed that was not FOSSILIZED at capture is dropped.

        Args:
            captured: what :meth:`rollback_state` returned at capture; None if the slot was not known then.
            keep_seed: the seed of then comes back at its stage instead, whatever that was.
        """
        if keep_seed and captured is not None:
            for name, value in captured["seed"].items():  # type: ignore[attr-defined]
                setattr(self, name, value)
            if self._stream is not None:
                self._stream.load_state(captured["stream"])  # type: ignore[arg-type]
            return
        stage = captured["stage"] if captured is not None else SeedStage.DORMANT
        same_seed = (
            captured is not None and captured["generation"] == self.generation and self.seed is not None
        )
        if stage is SeedStage.FOSSILIZED and same_seed:
            assert captured is not None
            self.alpha_limit.fill_(1.0)
            self.schedule, self._stage = None, SeedStage.FOSSILIZED
            if self._stream is not None and captured["stream"] is not None:
                self._stream.load_state(captured["stream"])  # type: ignore[arg-type]
            return
        self._drop(SeedStage.DORMANT if stage is SeedStage.DORMANT else SeedStage.CULLED)

    def zero_alpha_tensors(self) -> list[Tensor]:
        """What a capture taken now restores as 0: alpha and its limit, unless the seed is a fossil."""
        return [] if self._stage is SeedStage.FOSSILIZED else [self.alpha, self.alpha_limit]

    def incubating_tensors(self) -> list[Tensor]:
        """Tensors of a seed that cannot reach the loss yet; a non-finite value there culls it alone."""
        if self.seed is None or self._stage not in (SeedStage.GERMINATED, SeedStage.TRAINING):
            return []
        return [*self.seed.parameters(), *self.seed.buffers()]

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

    def _resume(self, stage: SeedStage, schedule: Mapping[str, Any] | None) -> None:
        if stage is SeedStage.GERMINATED:
            return
        self.start_training()
        if stage is SeedStage.TRAINING:
            return
        settings = schedule or {"steps": 1, "kind": "linear", "end": 1.0}
        blending = self.start_blending(settings["steps"], settings["kind"], end=settings["end"])
        if stage is SeedStage.FOSSILIZED:
            self.fossilize()
        elif schedule is not None:
            blending.load_state_dict(schedule)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SeedSlot:
        """``.to``, ``.half`` and friends move alpha but leave it float32."""
        kept = {name: getattr(self, name) for name in ("alpha", "alpha_limit")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        if self.schedule is not None:
            self.schedule.rebind(self.alpha, self.alpha_position, self.alpha_limit)
        return self

    def extra_repr(self) -> str:
        """Name, stage and blueprint."""
        return f"{self.name!r}, stage={self._stage.name}, blueprint={self.blueprint!r}"

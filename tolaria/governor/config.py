"""Settings of a governor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tolaria.errors import ConfigError
from tolaria.ops import ConfigField

Preset = Literal["default", "balanced", "strict", "classic"]
"""A set of settings by its name."""

_SUSPICIOUS_STATE = ("off", "tell", "rollback")
"""In the order in which the judge counts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GovernorConfig:
    """What counts as a panic, how often state is captured, and what a rollback does.

    Raises:
        ConfigError: a field is out of range; the message lists every bad one.
    """

    window: int = 20
    """Healthy losses remembered, H (losses, >= min_history)."""
    min_history: int = 10
    """Healthy losses needed before an explosion or a lobotomy can be judged (losses, >= 2)."""
    absolute_threshold: float | None = 10.0
    """A loss up to this is no explosion (loss units); None: max(10, 1.5 times the random-guess loss)."""
    sensitivity: float = 6.0
    """A loss up to mean + this many standard deviations is no explosion (dimensionless, > 0)."""
    multiplier: float = 3.0
    """A loss up to so many means is no explosion; silent unless the mean is positive (dimensionless, > 0)."""
    rule: Literal["all", "any"] = "all"
    """Whether all three thresholds must be passed, or any one of them."""
    min_std: float = 0.0
    """Floor of the standard deviation, as a share of |mean|: a flat plateau must not shoot a healthy run."""
    warmup_bound: float | None = math.inf
    """While H is shorter than min_history, a loss above this is an anomaly (loss units); None: as above."""
    min_panics_before_rollback: int = 2
    """Anomalies in a row that order a rollback (>= 1)."""
    lobotomy_healthy_below: float = 0.6
    """A network has learnt once its loss was below this share of the random-guess loss (0 to 1)."""
    lobotomy_band: tuple[float, float] = (0.95, 1.05)
    """Collapse to chance: a loss between these multiples of the random-guess loss; the upper may be inf."""
    lobotomy_patience: int = 1
    """In-band losses that order a rollback (>= 1)."""
    lobotomy_rule: Literal["latched", "classic"] = "latched"
    """``"latched"``: a network has learnt once the mean of H was low enough, an in-band loss is a collapse at
    once only where chance lies outside of H's own spread, and losses at chance or worse add up to one.
    ``"classic"``: any in-band loss after a healthy one that was low enough."""
    collapse_patience: float = 12.0
    """Losses at chance level that add up to a collapse; one above the band counts a quarter, one nearer to
    the learnt level than to chance takes one back (losses, >= 1)."""
    drift_horizon: int = 0
    """Healthy losses over which the drift test's baseline forgets; 0: no drift test (losses)."""
    drift_slack: float = 0.5
    """Standard deviations above the baseline that the drift test lets pass, at each loss (>= 0)."""
    drift_threshold: float = 2.0
    """The drift sum that orders a rollback, in horizons (standard deviations times losses, > 0)."""
    shift_horizon: int = 0
    """Losses over which the shift test's level forgets; it knows a level after half of them. 0: no shift test
    (losses)."""
    shift_slack: float = 0.5
    """Mean absolute deviations above the level that the shift test lets pass, at each loss (>= 0)."""
    shift_threshold: float = 60.0
    """The shift sum that orders a rollback: twice the losses that a large shift takes, since one loss adds 2
    at most (mean absolute deviations times losses, > 0)."""
    shift_spike: float = math.inf
    """A gradient norm above so many times its level makes the shift test keener for 80 losses: no slack,
    and a third of the threshold (dimensionless, > 0)."""
    validation_patience: int = 2
    """Bad values in a row that :meth:`TolariaGovernor.step_validation` rolls back at (>= 1)."""
    gradient_norm: bool = False
    """Judge the norm of the gradients of all covered optimizers beside the loss: one more pass over them."""
    gradient_multiplier: float = 10.0
    """A norm up to so many means of its own window is no anomaly (dimensionless, > 0)."""
    suspicious_state: Literal["off", "tell", "rollback"] = "tell"
    """What is done about a capture in which a parameter or buffer is beyond 1,000 times its largest magnitude
    (or 1e-3) in three or more promoted captures, until it is back within twice that. ``"tell"``: it is not
    promoted, and an event names the tensor; one that settles there for five capture intervals is accepted.
    ``"rollback"``: the state goes back, too; a level that comes again after two rollbacks is accepted."""
    cooldown: int = 0
    """Steps after a rollback during which only non-finite losses are judged and none joins H (>= 0)."""
    snapshot_interval: int = 100
    """Steps between captures (steps, > probation)."""
    probation: int = 2
    """Healthy verdicts after a capture before it becomes the last known good one (>= 1)."""
    log_only: bool = False
    """Judge and tell, never act."""
    death_penalty: float = 10.0
    """Reward of a rollback for an RL agent is minus this (>= 0)."""
    lr_factor: float = 1.0
    """At each rollback the learning rate is multiplied by this, compounding (> 0, <= 1)."""
    lr_recovery_steps: int = 0
    """After so many healthy steps in a row since the last rollback the learning rates are again what their
    schedule alone would make them (steps, >= 0). 0: they stay lowered."""
    skip_batches: int = 0
    """So many batches are left out after each rollback, one by hand, too: by
    :class:`tolaria.data.SkipBatches` around the loader, and by the loops of :mod:`tolaria.train` (batches as
    the loader yields them, >= 0)."""
    max_rollbacks: int = 25
    """So many rollbacks inside ``rollback_window`` raise TrainingDivergedError (>= 1)."""
    rollback_window: int = 1000
    """Steps over which rollbacks are counted (>= 1)."""
    max_restores_of_one_capture: int = 5
    """So many restores of one capture in a row without progress raise TrainingDivergedError (>= 1): each was
    followed by fewer than ``min_history`` healthy steps, or all by the same number. Manual ones do not
    count."""
    restore_rng: bool = False
    """Whether a rollback puts the random generators back. False: the run goes on with new draws, so a loop
    that draws its batches from them does not meet the same bad batch again. True: the first restore of a
    capture replays its draws bit for bit, a repeated one draws other numbers, reproducibly; the generators
    are those of the whole process (torch's of the CPU and of the device, ``random``, NumPy's) and those in
    ``generators=``."""
    skip_anomalous_steps: bool = False
    """Leave out the optimizer step of an unhealthy loss: judge before it, ``step(verdict)`` after it."""
    skips_before_rollback: int = None  # type: ignore[assignment]  # None is replaced in __post_init__
    """So many bad steps in a row, a NaN too, are let pass while parameters, buffers and optimizer state are
    finite; then a rollback (>= 0). None: 3 with ``skip_anomalous_steps``, which leaves them out, else 0, with
    which a NaN rolls back at once. On CUDA the state is searched at every step unless this is 0."""
    seed_check_interval: int = 20
    """Steps between searches for non-finite values in incubating seeds (>= 1; 0: never)."""
    storage: Literal["pinned", "device"] = "pinned"
    """Where slots of a CUDA model lie: page-locked host memory, or the device's own."""
    save_every: int = 0
    """Write every so many promotions to ``save_path`` beside training; see ``TolariaGovernor.save`` (>= 0; 0:
    none). With two states being written already, one is passed over for the next."""
    save_path: str | None = None
    """Folder for ``save_every``."""
    event_capacity: int = 256
    """Events that can wait for ``poll()`` on a CUDA device before the oldest are dropped (>= 1)."""

    def __post_init__(self) -> None:
        if self.skips_before_rollback is None:
            object.__setattr__(self, "skips_before_rollback", self._default_skips())
        problems = [f"{name}: expected {wanted}, got {got!r}" for name, wanted, got in self._problems()]
        if problems:
            raise ConfigError("GovernorConfig: " + "; ".join(problems))

    def _default_skips(self) -> int:
        return 3 if self.skip_anomalous_steps is True else 0

    def _problems(self) -> list[tuple[str, str, object]]:
        counts: dict[str, tuple[int, float]] = {
            "min_history": (2, 4096),
            "window": (2, 4096),
            "min_panics_before_rollback": (1, math.inf),
            "lobotomy_patience": (1, math.inf),
            "drift_horizon": (0, math.inf),
            "shift_horizon": (0, math.inf),
            "validation_patience": (1, math.inf),
            "cooldown": (0, math.inf),
            "snapshot_interval": (2, math.inf),
            "probation": (1, math.inf),
            "max_rollbacks": (1, math.inf),
            "rollback_window": (1, math.inf),
            "max_restores_of_one_capture": (1, math.inf),
            "skips_before_rollback": (0, math.inf),
            "lr_recovery_steps": (0, math.inf),
            "skip_batches": (0, math.inf),
            "seed_check_interval": (0, math.inf),
            "save_every": (0, math.inf),
            "event_capacity": (1, 1 << 20),
        }
        found: list[tuple[str, str, object]] = []
        for name, (low, high) in counts.items():
            value = getattr(self, name)
            if not _is_number(value) or not isinstance(value, int) or not low <= value <= high:
                limit = f" and at most {int(high)}" if math.isfinite(high) else ""
                found.append((name, f"an integer of at least {low}{limit}", value))
        for name in (
            *("sensitivity", "multiplier", "drift_threshold", "gradient_multiplier"),
            *("shift_threshold", "shift_spike"),
        ):
            if not (_is_number(getattr(self, name)) and getattr(self, name) > 0):
                found.append((name, "a number above 0", getattr(self, name)))
        if not (_is_number(self.lr_factor) and 0 < self.lr_factor <= 1):
            found.append(("lr_factor", "a number above 0 and at most 1", self.lr_factor))
        for name in ("absolute_threshold", "warmup_bound"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > 0):
                found.append((name, "a number above 0, or None", value))
        for name in (*("min_std", "death_penalty", "lobotomy_healthy_below", "drift_slack", "shift_slack"),):
            if not (_is_number(getattr(self, name)) and 0 <= getattr(self, name) < math.inf):
                found.append((name, "a finite number of at least 0", getattr(self, name)))
        if not (_is_number(self.collapse_patience) and 1 <= self.collapse_patience < math.inf):
            found.append(("collapse_patience", "a finite number of at least 1", self.collapse_patience))
        if self.lobotomy_rule not in ("latched", "classic"):
            found.append(("lobotomy_rule", "'latched' or 'classic'", self.lobotomy_rule))
        if self.suspicious_state not in _SUSPICIOUS_STATE:
            found.append(("suspicious_state", "'off', 'tell' or 'rollback'", self.suspicious_state))
        if self.rule not in ("all", "any"):
            found.append(("rule", "'all' or 'any'", self.rule))
        if self.storage not in ("pinned", "device"):
            found.append(("storage", "'pinned' or 'device'", self.storage))
        band = self.lobotomy_band
        if not (
            isinstance(band, tuple | list)
            and len(band) == 2
            and all(map(_is_number, band))
            and band[0] <= band[1]
        ):
            found.append(("lobotomy_band", "(low, high) with low <= high", band))
        for name in ("gradient_norm", "log_only", "restore_rng", "skip_anomalous_steps"):
            if not isinstance(getattr(self, name), bool):
                found.append((name, "True or False", getattr(self, name)))
        path = self.save_path
        if not (path is None or (isinstance(path, str) and path and "\0" not in path)):
            found.append(("save_path", "a path as a string, or None", path))
        bad = {name for name, _, _ in found}
        if "save_every" not in bad and self.save_every and self.save_path is None:
            found.append(("save_path", "a folder, since save_every is set", None))
        if not bad & {"window", "min_history"} and self.window < self.min_history:
            found.append(("window", f"at least min_history = {self.min_history}", self.window))
        if not bad & {"snapshot_interval", "probation"} and self.snapshot_interval <= self.probation:
            found.append(
                ("snapshot_interval", f"more than probation = {self.probation}", self.snapshot_interval)
            )
        return found

    @classmethod
    def classic(cls, **overrides: object) -> GovernorConfig:
        """The rule of the first version to the letter: any loss of guessing after a learnt one is a collapse.

        Args:
            **overrides: fields that are to differ.

        Raises:
            ConfigError: a field is out of range.
        """
        settings: dict[str, Any] = {"lobotomy_rule": "classic", "suspicious_state": "off", **overrides}
        return cls(**settings)

    @classmethod
    def balanced(cls, **overrides: object) -> GovernorConfig:
        """What we recommend: broken runs are caught, those that recover by themselves are left alone.

        It has no threshold in loss units, so it serves losses of 1e-4 and of 1e4, around zero and negative
        ones. A loss or gradient that is not finite rolls back at once; anything else has to last: losses
        that stay above their own level for about thirty steps (the shift test), or at the loss of guessing.
        A tensor of unheard-of magnitude in a capture rolls back as well. The norm of the gradients is taken
        at each step: one more pass over them. docs/judge.md has its row of the arena.

        Args:
            **overrides: fields that are to differ.

        Raises:
            ConfigError: a field is out of range.
        """
        settings: dict[str, Any] = {
            "absolute_threshold": math.inf,
            "min_std": 0.1,
            "lobotomy_patience": 10,
            "collapse_patience": 30.0,
            "shift_horizon": 40,
            "shift_spike": 100.0,
            "gradient_norm": True,
            "gradient_multiplier": math.inf,
            "suspicious_state": "rollback",
            "snapshot_interval": 50,
            "probation": 20,
            **overrides,
        }
        return cls(**settings)

    @classmethod
    def strict(cls, random_guess_loss: float | None = None, **overrides: object) -> GovernorConfig:
        """Settings without the default rule's blind spots.

        Any threshold trips, the warm-up is bounded, slow climbs are found, and the gradient's norm is judged.

        Args:
            random_guess_loss: loss of guessing, r; the absolute threshold is max(10, 1.5 r). None: the one
                that the governor is made with.
            **overrides: fields that are to differ.

        Raises:
            ConfigError: the loss of guessing is no positive finite number, or a field is out of range.
        """
        if random_guess_loss is not None and not (
            _is_number(random_guess_loss) and 0 < random_guess_loss < math.inf
        ):
            raise ConfigError(
                f"random_guess_loss: expected a positive finite number or None, got {random_guess_loss!r}"
            )
        absolute = None if random_guess_loss is None else max(10.0, 1.5 * random_guess_loss)
        settings: dict[str, Any] = {
            "rule": "any",
            "min_std": 0.05,
            "absolute_threshold": absolute,
            "warmup_bound": absolute,
            "drift_horizon": 50,
            "gradient_norm": True,
            "suspicious_state": "rollback",
            **overrides,
        }
        return cls(**settings)

    @classmethod
    def preset(cls, name: Preset, **overrides: object) -> GovernorConfig:
        """The settings of that name: ``"default"``, ``"balanced"``, ``"strict"`` or ``"classic"``.

        Args:
            name: which.
            **overrides: fields that are to differ.

        Raises:
            ConfigError: there is no such preset, or a field is out of range.
        """
        made: dict[str, Callable[..., GovernorConfig]] = {
            "default": cls, "balanced": cls.balanced, "strict": cls.strict, "classic": cls.classic
        }  # fmt: skip
        if not isinstance(name, str) or name not in made:
            raise ConfigError(f"preset: expected one of {', '.join(made)}, got {name!r}")
        return made[name](**overrides)

    def replace(self, **changes: object) -> GovernorConfig:
        """A copy with some fields changed, checked anew.

        A ``skips_before_rollback`` that is what it would be by default follows ``skip_anomalous_steps``.
        """
        fields: dict[str, Any] = changes
        if self.skips_before_rollback == self._default_skips():
            fields = {"skips_before_rollback": None, **changes}
        return dataclasses.replace(self, **fields)

    def to_tensor(
        self,
        random_guess_loss: float | None,
        device: torch.device | str,
        *,
        gradient_may_overflow: bool = False,
    ) -> Tensor:
        """The fields that ``governor_step_`` reads: float64 ``(CONFIG_FIELDS,)`` on ``device``.

        Args:
            random_guess_loss: loss of guessing, or None.
            device: where the governors live.
            gradient_may_overflow: whether a non-finite gradient is routine, as it is under a GradScaler.
        """
        fallback = max(10.0, 1.5 * (random_guess_loss or 0.0))
        absolute, warm = self.absolute_threshold, self.warmup_bound
        derived = {
            ConfigField.absolute_threshold: fallback if absolute is None else absolute,
            ConfigField.warmup_bound: fallback if warm is None else warm,
            ConfigField.gradient_may_overflow: gradient_may_overflow,
            ConfigField.rule_any: self.rule == "any",
            ConfigField.suspicious_state: _SUSPICIOUS_STATE.index(self.suspicious_state),
            ConfigField.lobotomy_classic: self.lobotomy_rule == "classic",
            ConfigField.random_guess_loss: math.nan if random_guess_loss is None else random_guess_loss,
            ConfigField.lobotomy_low: self.lobotomy_band[0],
            ConfigField.lobotomy_high: self.lobotomy_band[1],
        }
        values = [float(derived[f] if f in derived else getattr(self, f.name)) for f in ConfigField]
        return torch.tensor(values, dtype=torch.float64, device="cpu").to(device)


def resolve_random_guess_loss(num_classes: int | None, random_guess_loss: float | None) -> float | None:
    """The loss of guessing: as given, or ln(num_classes), or None.

    Raises:
        ValueError: ``num_classes`` below 2, or a loss that is not positive and finite.
    """
    if random_guess_loss is not None:
        is_number = isinstance(random_guess_loss, int | float) and not isinstance(random_guess_loss, bool)
        if not (is_number and 0 < random_guess_loss < math.inf):
            raise ValueError(
                f"random_guess_loss: expected a positive finite number, got {random_guess_loss!r}"
            )
        return float(random_guess_loss)
    if num_classes is None:
        return None
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"num_classes: expected an integer of at least 2, got {num_classes!r}")
    return math.log(num_classes)


def _is_number(value: object) -> bool:
    """Whether it is a number that a float64 can hold; not NaN."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**1023
    return isinstance(value, float) and not math.isnan(value)

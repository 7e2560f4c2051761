"""DESIGN section 4 once more, one loss at a time in plain Python floats: shares nothing with the package."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class PlainRule:
    """Judges one run; ``judge`` returns (reason, rollback)."""

    guess: float | None = None
    window: int = 20
    min_history: int = 10
    absolute: float = 10.0
    sigmas: float = 6.0
    multiple: float = 3.0
    patience: int = 1
    min_panics: int = 2
    cooldown: int = 0
    rule: str = "all"
    min_std: float = 0.0
    warmup_bound: float = math.inf
    band: tuple[float, float] = (0.95, 1.05)
    drift_horizon: int = 0
    drift_slack: float = 0.5
    drift_threshold: float = 2.0
    gradient_multiple: float = 10.0
    skips_allowed: int = 0
    classic: bool = False
    collapse_patience: float = 12.0
    shift_horizon: int = 0
    shift_slack: float = 0.6
    shift_threshold: float = 60.0
    shift_spike: float = math.inf
    history: list[float] = field(default_factory=list)
    last_healthy: float = 0.0
    consecutive: int = 0
    pending: int = 0
    resting: int = 0
    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    norms: list[float] = field(default_factory=list)
    baseline: tuple[float, float, float] = (0.0, 0.0, 0.0)
    drift: float = 0.0
    left_out: int = 0
    learnt: bool = False
    level: float = 0.0
    evidence: float = 0.0
    seen: int = 0
    typical: float = 0.0
    deviation: float = 0.0
    start: float = 0.0
    lately: float = 0.0
    wandering: float = 0.0
    loudness: float = 0.0
    shift: float = 0.0
    armed: int = 0

    def judge(
        self, x: float, nonfinite: bool = False, norm: float | None = None, state_bad: bool = False
    ) -> tuple[str, bool]:
        reason, rollback = self.judge_at_once(x, nonfinite, norm)
        if rollback and not state_bad and reason != "DRIFT" and self.left_out < self.skips_allowed:
            rollback = False
        if reason != "HEALTHY" and not rollback:
            self.left_out += 1
        return reason, rollback

    def judge_at_once(self, x: float, nonfinite: bool, norm: float | None) -> tuple[str, bool]:
        resting, self.resting = self.resting, max(0, self.resting - 1)
        if nonfinite or not math.isfinite(x):
            return "NON_FINITE", True
        if norm is not None and not math.isfinite(norm):
            return "GRADIENT_NORM", True
        if resting:
            return "HEALTHY", False
        warm = len(self.history) < self.min_history
        at_once, collapsed = self.look_for_collapse(x, warm)
        scale, shifted = self.look_for_shift(x, norm)
        if at_once or collapsed:
            self.pending += at_once
            return "LOBOTOMY", collapsed or self.pending >= self.patience
        if shifted:
            return "DRIFT", True
        if x > self.warmup_bound if warm else self.explodes(x):
            self.consecutive += 1
            return "ANOMALY", self.consecutive >= self.min_panics
        if norm is not None and len(self.norms) >= self.min_history and self.is_steep(norm):
            self.consecutive += 1
            return "GRADIENT_NORM", self.consecutive >= self.min_panics
        drift = self.drift_with(x)
        if drift > self.drift_threshold * self.drift_horizon:
            return "DRIFT", True
        self.drift = drift
        self.move_baseline(x)
        self.move_level(x, scale, norm)
        if self.learnt and self.guess is not None:
            self.level += (min(x, self.band[0] * self.guess) - self.level) / 64.0
        if norm is not None:
            self.norms = [*self.norms, norm][-self.window :]
        self.history = [*self.history, x][-self.window :]
        self.last_healthy, self.consecutive, self.pending, self.left_out = x, 0, 0, 0
        self.count += 1
        delta = x - self.mean
        self.mean += delta / self.count
        self.m2 += delta * (x - self.mean)
        return "HEALTHY", False

    def look_for_collapse(self, x: float, warm: bool) -> tuple[bool, bool]:
        """Whether x is a collapse at once, and whether the losses have added up to one."""
        if self.guess is None:
            return False, False
        low, high = (edge * self.guess for edge in self.band)
        fell = not warm and self.last_healthy < 0.6 * self.guess and low <= x <= high
        mean, std = self.statistics(self.history) if self.history else (0.0, math.nan)
        if not self.learnt and not warm and mean < 0.6 * self.guess:
            self.learnt, self.level = True, mean
        if self.classic:
            return fell, False
        if not self.learnt:
            return False, False
        if low <= x <= high:
            self.evidence += 1.0
        elif x > high:
            self.evidence += 0.25
        elif x < 0.5 * (self.level + low):
            self.evidence -= 1.0
        self.evidence = min(max(self.evidence, 0.0), 2.0 * self.collapse_patience)
        return fell and low > mean + self.sigmas * std, self.evidence >= self.collapse_patience

    def look_for_shift(self, x: float, norm: float | None) -> tuple[float, bool]:
        """The scale of the losses, and whether they have stayed above their level for long enough."""
        if not self.shift_horizon:
            return 0.0, False
        self.armed = max(0, self.armed - 1)
        knows = self.seen >= self.shift_horizon / 2
        knows_norm = norm is not None and knows and self.loudness > 0
        if knows_norm and norm > self.shift_spike * self.loudness:
            self.armed = 80
        scale = max(self.deviation, 8.0 * self.wandering, 0.02 * (self.start - self.typical))
        scale = max(scale, self.min_std * self.typical)
        if not knows:
            return scale, False
        distance = x - self.typical
        if scale > 0 and math.isfinite(distance / scale):
            z = distance / scale
        else:
            z = math.copysign(math.inf, distance) if distance != 0 else 0.0
        if knows_norm and norm < 0.25 * self.loudness and z > 0:
            z += 1.0
        z = min(2.0, max(-1.0, z - (0.0 if self.armed else self.shift_slack)))
        self.shift = min(max(self.shift + z, 0.0), 2.0 * self.shift_threshold)
        shifted = self.shift >= self.shift_threshold / (3.0 if self.armed else 1.0)
        if shifted:
            self.seen, self.shift, self.armed = 0, 0.0, 0
        return scale, shifted

    def move_level(self, x: float, scale: float, norm: float | None) -> None:
        climbs = self.shift > 0.15 * self.shift_threshold
        if not self.shift_horizon or (climbs and not self.typical < 0):
            return
        knows = self.seen >= self.shift_horizon / 2
        seen = min(self.seen + 1, self.shift_horizon)
        distance = x - self.typical
        if knows:
            distance = min(max(distance, -4.0 * scale), 4.0 * scale)
        moved = self.typical + distance / seen
        away = abs(distance) if knows else abs(x - moved)
        wider = self.deviation + (away - self.deviation) / seen
        lately = self.lately + (self.typical + distance - self.lately) / min(seen, 10)
        wandering = self.wandering + (max(0.0, lately - moved) - self.wandering) / (4.0 * self.shift_horizon)
        if not all(map(math.isfinite, (moved, wider, lately, wandering))):
            return
        if climbs:
            self.typical += 0.5 * (distance / seen)
        else:
            self.seen, self.typical, self.deviation, self.lately = seen, moved, wider, lately
            if norm is not None:
                heard = min(norm, 4.0 * self.loudness) if knows and self.loudness > 0 else norm
                self.loudness = self.loudness + (heard - self.loudness) / seen if self.loudness > 0 else heard
            if knows:
                self.wandering = wandering
            else:
                self.start = max(self.start, moved)

    @staticmethod
    def statistics(values: list[float]) -> tuple[float, float]:
        mean = m2 = 0.0
        for i, x in enumerate(values, start=1):
            delta = x - mean
            mean += delta / i
            m2 += delta * (x - mean)
        return mean, math.sqrt(m2 / len(values)) if m2 == m2 and m2 != math.inf else m2

    def is_steep(self, norm: float) -> bool:
        mean, std = self.statistics(self.norms)
        spread = max(std, self.min_std * abs(mean))
        return norm > mean + self.sigmas * spread and norm > self.gradient_multiple * mean

    def drift_with(self, x: float) -> float:
        count, mean, variance = self.baseline
        if not self.drift_horizon or count < self.min_history:
            return self.drift
        spread = max(math.sqrt(variance), self.min_std * abs(mean))
        if spread > 0 and math.isfinite(x - mean):
            z = min(2.0, max(-2.0, (x - mean) / spread))
        else:
            z = math.copysign(2.0, x - mean) if x != mean else 0.0
        return max(0.0, self.drift + z - self.drift_slack)

    def move_baseline(self, x: float) -> None:
        count, mean, variance = self.baseline
        count = min(count + 1.0, float(self.drift_horizon))
        if count:
            delta = x - mean
            mean += delta / count
            variance += (delta * (x - mean) - variance) / count
            fine = math.isfinite(mean) and math.isfinite(variance)
            self.baseline = (count, mean, variance) if fine else (1.0, x, 0.0)

    def explodes(self, x: float) -> bool:
        mean, std = self.statistics(self.history)
        statistical = x > mean + self.sigmas * max(std, self.min_std * abs(mean))
        if self.rule == "all":
            return x > self.absolute and statistical and (mean <= 0 or x > self.multiple * mean)
        return x > self.absolute or statistical or (mean > 0 and x > self.multiple * mean)

    def rolled_back(self) -> None:
        """As after a restore to the attach-time state."""
        self.history, self.last_healthy, self.consecutive, self.pending, self.left_out = [], 0.0, 0, 0, 0
        self.resting = self.cooldown
        self.norms, self.baseline, self.drift = [], (0.0, 0.0, 0.0), 0.0
        self.learnt, self.level, self.evidence = False, 0.0, 0.0
        self.seen = self.armed = 0
        self.typical = self.deviation = self.start = self.lately = 0.0
        self.wandering = self.loudness = self.shift = 0.0

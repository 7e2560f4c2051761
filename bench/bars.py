"""The speed to reach, what was measured, and whether it was reached: one group a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from summary import Group, Ratio, Session, Timing

ALL = "float32/contiguous/all threads"
Measure = Callable[[Group], Ratio | None]


@dataclass(frozen=True)
class Bar:
    """One demand on one group."""

    work: str
    group: str
    demand: str
    measure: Measure
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "x"

    def verdict(self, session: Session) -> tuple[str, str]:
        """What was measured with its interval; ``met`` or ``NOT MET`` (by the median) or ``not measured``."""
        group = session.groups.get(self.group)
        found = self.measure(group) if group else None
        if found is None:
            return "", "not measured"
        value = found.value
        is_met = (self.at_least is None or value >= self.at_least) and (
            self.at_most is None or value <= self.at_most
        )
        interval = f" ({found.low:,.2f} to {found.high:,.2f})" if found.low < found.high else ""
        return f"{value:,.2f} {self.unit}{interval}", "met" if is_met else "NOT MET"


def _times(of: str, to: str = "fused") -> Measure:
    return lambda group: group.ratio(of, to)


def _over_ceiling(group: Group) -> Ratio | None:
    return group.ratio("fused", group.ceiling) if group.ceiling else None


def _of_ceiling(group: Group) -> Ratio | None:
    return group.ratio(group.ceiling, "fused") if group.ceiling else None


def _quartiles(timing: Timing, scale: float) -> Ratio:
    low, high = timing.quartiles
    return Ratio(scale * timing.median, scale * low, scale * high)


def _microseconds(group: Group) -> Ratio | None:
    return _quartiles(group.timings["fused"], 1e6)


def _share(group: Group) -> Ratio | None:
    timing = group.timings["fused"]
    step = timing.info.get("step_seconds")
    return _quartiles(timing, 100 / step) if step else None


def _allocations(group: Group) -> Ratio | None:
    count = group.timings["fused"].info.get("allocations")
    return None if count is None else Ratio(count, count, count)


def _overhead(group: Group) -> Ratio | None:
    info = group.timings["fused"].info
    return Ratio(info["overhead_percent_100"], *info["overhead_interval_100"])


def _blend(size: str, alpha: bool) -> list[Bar]:
    group, work = f"blend/both{'+alpha' if alpha else ''}/{size}/{ALL}", "blend forward + backward"
    work += f", {size}, {'with' if alpha else 'without'} grad_alpha"
    return [
        Bar(
            work, group, f">= {1.5 if alpha else 1.2} x eager", _times("lerp"), at_least=1.5 if alpha else 1.2
        ),
        Bar(work, group, ">= 0.95 x torch.compile", _times("compiled"), at_least=0.95),
        Bar(work, group, ">= 0.85 of the ceiling", _of_ceiling, at_least=0.85),
    ]


def _small_blend(size: str, alpha: bool) -> Bar:
    name = "both+alpha" if alpha else "both"
    return Bar(
        f"blend {name}, {size}", f"blend/{name}/{size}/{ALL}", ">= 1 x eager", _times("lerp"), at_least=1
    )


_MODEL_STATS, _MANY = (
    "tensor_stats/resnet18/float32/all threads",
    "tensor_stats/1000 x 100/float32/all threads",
)
_CAPTURE, _RESTORE = (f"snapshot/{name}/resnet18 + AdamW/all threads" for name in ("capture", "restore"))
_LOGITS = "classification_metrics_/2048 x 50257/float32/all threads"
BARS = [
    *(bar for size in ("8 MiB", "64 MiB") for alpha in (True, False) for bar in _blend(size, alpha)),
    *(_small_blend(size, alpha) for size in ("4 KiB", "32 KiB", "128 KiB") for alpha in (True, False)),
    Bar(
        "blend forward + backward, bfloat16, 8 MiB",
        "blend/both/8 MiB/bfloat16/contiguous/all threads",
        ">= 1.5 x eager",
        _times("lerp"),
        at_least=1.5,
    ),
    Bar(
        "straight_through forward, 8 MiB",
        f"straight_through/forward/8 MiB/{ALL}",
        "<= 1.1 x clone",
        _times("fused", "clone"),
        at_most=1.1,
    ),
    Bar(
        "straight_through forward + backward, 8 MiB",
        f"straight_through/both/8 MiB/{ALL}",
        ">= 2 x eager",
        _times("detach"),
        at_least=2,
    ),
    Bar("tensor_stats, ResNet-18", _MODEL_STATS, "<= 1.5 x the ceiling", _over_ceiling, at_most=1.5),
    Bar(
        "tensor_stats, ResNet-18",
        _MODEL_STATS,
        ">= 1.5 x _foreach_norm",
        _times("foreach_norm"),
        at_least=1.5,
    ),
    Bar(
        "tensor_stats, ResNet-18", _MODEL_STATS, ">= 10 x isfinite loop", _times("isfinite loop"), at_least=10
    ),
    Bar("tensor_stats, 1,000 of 100", _MANY, ">= 3 x _foreach_norm", _times("foreach_norm"), at_least=3),
    Bar("capture, ResNet-18 + AdamW", _CAPTURE, "<= 1.2 x the ceiling", _over_ceiling, at_most=1.2),
    Bar(
        "capture, ResNet-18 + AdamW",
        _CAPTURE,
        ">= 4 x clone + deepcopy",
        _times("clone + deepcopy"),
        at_least=4,
    ),
    Bar("capture, ResNet-18 + AdamW", _CAPTURE, "0 allocations", _allocations, at_most=0, unit=""),
    Bar("restore, ResNet-18 + AdamW", _RESTORE, "<= 1.2 x the ceiling", _over_ceiling, at_most=1.2),
    Bar(
        "governor.step, clean (digits), on its own",
        "governor.step/digits CNN/clean, alone",
        "<= 15 us",
        _microseconds,
        at_most=15,
        unit="us",
    ),
    Bar(
        "governor.step, clean (digits), in the loop",
        "governor.step/digits CNN/clean, in the loop",
        "<= 1% of the step",
        _share,
        at_most=1,
        unit="%",
    ),
    Bar("1,024 governors", "governor_step_/n=1024", "<= 60 us", _microseconds, at_most=60, unit="us"),
    Bar(
        "1,024 governors, with their mailbox",
        "governor_step_/n=1024, mailbox",
        "<= 60 us",
        _microseconds,
        at_most=60,
        unit="us",
    ),
    Bar("classification_metrics_, 2048 x 50257", _LOGITS, ">= 5 x eager", _times("eager"), at_least=5),
    Bar("classification_metrics_, 2048 x 50257", _LOGITS, "<= 2.5 x the ceiling", _over_ceiling, at_most=2.5),
    Bar(
        "guarded ResNet-18 step, capture every 100",
        "step/resnet18",
        "<= 1%",
        _overhead,
        at_most=1,
        unit="%",
    ),
]


def table(session: Session) -> list[str]:
    """The rows as Markdown."""
    lines = ["| work | bar | measured | |", "|---|---|---:|---|"]
    for bar in BARS:
        measured, verdict = bar.verdict(session)
        lines.append(f"| {bar.work} | {bar.demand} | {measured} | {verdict} |")
    return lines

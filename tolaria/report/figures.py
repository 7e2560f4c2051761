"""What is drawn: panels of curves over the steps, as plain values; the page gives them colours."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tolaria.report.lines import Line, number
from tolaria.report.reading import RunReading
from tolaria.report.sampling import Floats, MinMax
from tolaria.report.words import plain

_MOST_SPANS = 300
_TITLES = {
    "step/lr": ("Learning rate", ""), "step/alpha": ("Alpha, how much of the seed is blended in", ""),
    "validation/val_accuracy": ("Accuracy", "%"), "validation/perplexity": ("Perplexity", ""),
}  # fmt: skip
_OWN_PANELS = ("validation/val_loss", "step/gradient_norm")


def undone_spans(run: RunReading) -> list[list[int]]:
    """Steps that rollbacks took back: (restored, rolled back), the first three hundred."""
    spans = [
        [event["report"]["restored_step"], event["step"]]
        for event in run.log.incidents
        if event["kind"] == "rollback"
    ]
    return spans[:_MOST_SPANS]


def panels(run: RunReading) -> list[Line]:
    """The panels from top to bottom; those of which nothing is recorded are left out."""
    found = [_loss(run), _judge(run), _evidence(run), _gradient(run)]
    names = sorted(run.curves, key=lambda name: (not name.endswith("val_accuracy"), name))
    for name in names:
        if name not in _OWN_PANELS:
            found.append(_of_curve(run, name))
    log = run.log
    found.append(
        _panel("seconds", "Time of a step", "s", [_curve("seconds a step", log.step_seconds, "time")])
    )
    at, covers = log.state_bytes.points()
    if len(at):  # it stays until it changes
        at, covers = np.append(at, max(run.last_step, log.last_step)), np.append(covers, covers[-1])
    covered = _series("state that a capture covers", "memory", at, covers, shape="hv")
    resident = _curve("memory of the process", log.resident, "memory2")
    found.append(_panel("memory", "Memory", "B", [covered, resident]))
    return [panel for panel in found if panel["series"] or panel.get("odd")]


def _panel(name: str, title: str, unit: str, series: list[Line], **more: Any) -> Line:  # noqa: ANN401 (JSON)
    return {
        "id": name, "title": title, "unit": unit, "series": [s for s in series if len(s["x"])],
        **more,
    }  # fmt: skip


def _series(name: str, role: str, steps: Floats, values: Floats, **more: Any) -> Line:  # noqa: ANN401 (JSON)
    return {"name": name, "role": role, "x": _whole(steps), "y": _tidy(values), **more}


def _curve(name: str, curve: MinMax, role: str, **more: Any) -> Line:  # noqa: ANN401 (JSON)
    return _series(name, role, *curve.points(), **more)


def _loss(run: RunReading) -> Line:
    steps, values = run.loss.points()
    at, smooth = run.smooth.points()
    gone, gone_smooth = _is_undone(run, steps), _is_undone(run, at)
    series = [
        _series("loss", "raw", steps, np.where(gone, np.nan, values)),
        _series("taken back", "undone", steps, np.where(gone, values, np.nan)) if gone.any() else None,
        _series("smoothed", "smooth", at, np.where(gone_smooth, np.nan, smooth)),
    ]
    validation = run.curves.get("validation/val_loss")
    if validation is not None:
        series.append(_curve("validation loss", validation, "validation"))
    odd = [int(step) for step in run.loss.odd_steps()]
    guess = number(run.config.get("random_guess_loss"))
    lines = [] if guess is None or not math.isfinite(guess) else [["loss of guessing", guess]]
    return _panel(
        "loss", "Loss", "", [each for each in series if each is not None],
        log=_may_be_log(values), lines=lines, odd=odd, odd_count=run.loss.odd, incidents=True,
    )  # fmt: skip


def _judge(run: RunReading) -> Line:
    mean_at, mean = run.judged["mean"].points()
    if run.judge is None or not len(mean_at):
        return _panel("judge", "", "", [])
    std_at, std = run.judged["std"].points()
    spread = np.interp(mean_at, std_at, std) if len(std_at) else np.zeros_like(mean)
    steps, values = run.loss.points()
    series = [
        _series("loss", "raw", steps, values),
        _series(
            "mean of the window", "mean", mean_at, mean, low=_tidy(mean - spread), high=_tidy(mean + spread)
        ),
        _curve("statistical threshold", run.judged["statistical"], "threshold1"),
        _curve("multiplier threshold", run.judged["multiplier"], "threshold2"),
    ]
    settings: Line = run.config.get("governor") or {}
    absolute = number(settings.get("absolute_threshold"))
    lines = [["absolute threshold", absolute]] if absolute is not None and math.isfinite(absolute) else []
    finite = values[np.isfinite(values)]
    return _panel(
        "judge", "What the judge went by", "", series, log=_may_be_log(finite), lines=lines, incidents=True
    )


def _evidence(run: RunReading) -> Line:
    settings: Line = run.config.get("governor") or {}
    asked = {"drift": settings.get("drift_horizon"), "shift": settings.get("shift_horizon"), "collapse": 1}
    names = {
        "drift": "drift", "shift": "shift of the level", "collapse": "collapse to guessing (lobotomy)",
    }  # fmt: skip
    series = []
    for column, name in names.items():
        curve = run.judged[column]
        steps, values = curve.points()
        if asked[column] and len(values) and (values.max() > 0 or column != "collapse"):
            series.append(_series(name, f"evidence-{column}", steps, 100 * values))
    return _panel(
        "evidence", "Evidence that adds up, of what rolls back", "%", series, lines=[["rolls back", 100.0]]
    )


def _gradient(run: RunReading) -> Line:
    curve = run.curves.get("step/gradient_norm")
    if curve is None:
        return _panel("gradient", "", "", [])
    _, values = curve.points()
    series = [
        _curve("gradient norm", curve, "raw"),
        _curve("threshold", run.judged["gradient_threshold"], "threshold1"),
    ]
    odd = [int(step) for step in curve.odd_steps()]
    return _panel("gradient", "Norm of the gradient", "", series, log=_may_be_log(values), odd=odd,
                  odd_count=curve.odd)  # fmt: skip


def _of_curve(run: RunReading, name: str) -> Line:
    source, _, metric = name.partition("/")
    title, unit = _TITLES.get(name, (plain(metric), ""))
    curve = run.curves[name]
    role = "validation" if source == "validation" else "other"
    series = [_curve("validation" if name == "validation/val_accuracy" else plain(metric), curve, role)]
    if name == "validation/val_accuracy":
        tests = _tests(run)
        if tests:
            at, values = np.array(tests).T
            series.append(_series("test", "test", at, values))
    return _panel(f"curve-{plain(name)}", title, unit, series, odd=[int(s) for s in curve.odd_steps()],
                  odd_count=curve.odd)  # fmt: skip


def _tests(run: RunReading) -> list[tuple[float, float]]:
    """Where the test data was looked at."""
    found = []
    for key, at in (("host_test", run.summary.get("host_test_step")), ("test", run.summary.get("steps"))):
        figures = run.summary.get(key)
        step, value = number(at), number(figures.get("val_accuracy")) if isinstance(figures, dict) else None
        if step is not None and value is not None:
            found.append((step, value))
    return found


def lane(run: RunReading) -> Line:
    """Captures by what became of them, stages of the seeds, thinned where there are too many."""
    captures = {
        name: {
            "x": [step for step, _ in kept.kept],
            "id": [which for _, which in kept.kept],
            "count": kept.count,
        }
        for name, kept in run.log.captures.items()
    }
    pending = run.log.pending
    captures["pending"] = {
        "x": [] if pending is None else [pending[0]], "id": [] if pending is None else [pending[1]],
        "count": int(pending is not None),
    }  # fmt: skip
    stages = [[plain(stage), first, last] for stage, first, last in run.bands]
    return {"captures": captures, "stages": stages, "slot": plain(run.config.get("slot", ""))}


def _is_undone(run: RunReading, steps: Floats) -> Any:  # noqa: ANN401 (an array of bools)
    out = np.zeros(len(steps), dtype=bool)
    for low, high in undone_spans(run):
        out |= (steps > low) & (steps <= high)
    return out


def _may_be_log(values: Floats) -> bool:
    """Whether a logarithmic axis shows everything, and more of it."""
    return len(values) > 0 and bool(0 < 20 * values.min() < values.max())


def _whole(steps: Floats) -> list[int]:
    return [int(step) for step in steps]


def _tidy(values: Floats) -> list[float | None]:
    """Six digits; what is not finite is a gap, whose place the panel's ``odd`` tells."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]

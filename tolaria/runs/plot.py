"""``run.png``: one look at it tells what a run went through."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tolaria._optional import require

Line = dict[str, Any]
_STAGES = {
    "DORMANT": ("#f4f4f2", "host alone"),
    "GERMINATED": ("#f4f4f2", "germinated"),
    "TRAINING": ("#fff3d6", "incubating"),
    "BLENDING": ("#dff0fb", "blending"),
    "FOSSILIZED": ("#e3f3e1", "fossilized"),
    "CULLED": ("#efe6ee", "culled"),
}
_LOSS, _SMOOTH, _VALIDATION, _ALPHA = "#b9c4d0", "#1f4e79", "#d1495b", "#2a7f9e"
_ROLLBACK, _FAULT, _GOOD = "#c1121f", "#e07a00", "#4c956c"


@dataclass(slots=True)
class RunData:
    """What the lines of a run folder say, sorted for drawing."""

    steps: npt.NDArray[np.float64]
    losses: npt.NDArray[np.float64]
    alphas: npt.NDArray[np.float64]
    stages: list[str]
    validations: list[Line] = field(default_factory=list)
    events: dict[str, list[Line]] = field(default_factory=dict)
    config: Line = field(default_factory=dict)
    summary: Line = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> RunData:
        """From the files that :class:`RunFolder` writes."""
        from tolaria.runs.folder import read_lines

        lines = read_lines(folder / "metrics.jsonl")
        taken = [line for line in lines if line["kind"] == "step"]
        events: dict[str, list[Line]] = {}
        for event in read_lines(folder / "events.jsonl"):
            events.setdefault(str(event["kind"]), []).append(event)
        column = {
            key: np.array([line[key] for line in taken], dtype=np.float64)
            for key in ("step", "loss", "alpha")
        }
        return cls(
            steps=column["step"],
            losses=column["loss"],
            alphas=column["alpha"],
            stages=[str(line["stage"]) for line in taken],
            validations=[line for line in lines if line["kind"] == "validation"],
            events=events,
            config=json.loads((folder / "config.json").read_text(encoding="utf-8")),
            summary=json.loads((folder / "summary.json").read_text(encoding="utf-8")),
        )

    def bands(self) -> list[tuple[str, float, float]]:
        """Runs of steps in one stage: (stage, first, last)."""
        found: list[tuple[str, float, float]] = []
        for step, stage in zip(self.steps.tolist(), self.stages, strict=True):
            if found and found[-1][0] == stage:
                found[-1] = (stage, found[-1][1], step)
            else:
                found.append((stage, step - 1, step))
        return found


def plot_run(folder: str | Path, out: str | Path | None = None) -> Path:
    """Draw the run in ``folder``.

    Loss (log scale), accuracy, alpha, the seed's stages as bands; captures, anomalies, faults and rollbacks
    marked.

    Args:
        folder: a run folder.
        out: the picture; ``run.png`` in the folder if None.

    Returns:
        Where the picture is.

    Raises:
        FileNotFoundError: ``folder`` is no run folder.
        MissingDependencyError: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", feature="plot_run", package="matplotlib", extra="train")
    run = RunData.read(Path(folder))
    figure = figures.Figure(figsize=(10.5, 6.6), dpi=110, layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[5, 3, 2])
    for axis in axes:
        _draw_bands(axis, run)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#d9d9d9", linewidth=0.5)
        axis.set_axisbelow(True)
    _draw_loss(axes[0], run)
    _draw_accuracy(axes[1], run)
    _draw_alpha(axes[2], run)
    _draw_incidents(axes, run)
    axes[0].set_title(_title(run), loc="left", fontsize=11, pad=20)
    axes[0].legend(loc="lower center", fontsize=7.5, ncols=5, framealpha=0.85, edgecolor="#dddddd")
    axes[-1].set_xlabel("optimizer step")
    axes[-1].set_xlim(0, max(1.0, float(run.steps[-1]) if len(run.steps) else 1.0))
    target = Path(out) if out is not None else Path(folder) / "run.png"
    figure.savefig(target)
    return target


def _draw_bands(axis: Any, run: RunData) -> None:  # noqa: ANN401
    for stage, first, last in run.bands():
        axis.axvspan(first, last, color=_STAGES[stage][0], linewidth=0, zorder=0)


def _draw_loss(axis: Any, run: RunData) -> None:  # noqa: ANN401
    finite = np.isfinite(run.losses) & (run.losses > 0)
    shown = np.where(finite, run.losses, np.nan)
    axis.plot(run.steps, shown, color=_LOSS, linewidth=0.6, label="training loss")
    restarts = {event["report"]["step"] for event in run.events.get("rollback", ())}
    axis.plot(
        run.steps,
        _smoothed(shown, run.steps, restarts),
        color=_SMOOTH,
        linewidth=1.5,
        label="training loss, smoothed",
    )
    where = [line["step"] for line in run.validations]
    axis.plot(where, [line["val_loss"] for line in run.validations], color=_VALIDATION, linewidth=1.0,
              marker="o", markersize=2.5, label="validation loss")  # fmt: skip
    guess = float(run.config["random_guess_loss"])
    axis.axhline(guess, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)))
    axis.annotate("guessing", (1, guess), xycoords=("axes fraction", "data"), xytext=(-3, 2),
                  textcoords="offset points", fontsize=7, color="#777777", ha="right")  # fmt: skip
    axis.set_yscale("log")
    axis.set_ylabel("loss")
    if finite.any():
        low, high = float(shown[finite].min()), float(shown[finite].max())
        floor = max(low, float(np.quantile(shown[finite], 0.02)) * 0.5)
        axis.set_ylim(floor * 0.25, max(high, guess) * 3.0)  # room for the legend below
    width = max(1.0, float(run.steps[-1]) if len(run.steps) else 1.0)
    for stage, first, last in run.bands():
        if last - first > 0.04 * width:
            axis.annotate(_STAGES[stage][1], ((first + last) / 2, 1), xycoords=("data", "axes fraction"),
                          xytext=(0, 4), textcoords="offset points", fontsize=8.5, ha="center")  # fmt: skip


def _draw_accuracy(axis: Any, run: RunData) -> None:  # noqa: ANN401
    where = [line["step"] for line in run.validations]
    values = [line["val_accuracy"] for line in run.validations]
    axis.plot(where, values, color=_VALIDATION, linewidth=1.2, marker="o", markersize=2.5, label="validation")
    ends = [phase["end_step"] for phase in run.summary["phases"]]
    seen: list[float] = []
    for key, at, text in (
        ("host_test", ends[:1], "test, host alone"),
        ("test", ends[-1:], "test, at the end"),
    ):
        figures = run.summary.get(key)
        if figures is None or not at:
            continue
        value = float(figures["val_accuracy"])
        seen.append(value)
        axis.plot(
            at, [value], marker="D", markersize=6, color=_SMOOTH, linestyle="none", zorder=5, clip_on=False
        )
        axis.annotate(f"{text} {value:.2f}%", (at[0], value), xytext=(-9, -4), textcoords="offset points",
                      fontsize=8, ha="right", color=_SMOOTH, zorder=6,
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5})  # fmt: skip
    axis.set_ylabel("accuracy (%)")
    finite = sorted(v for v in [*values, *seen] if math.isfinite(v))
    if finite:
        middle = finite[len(finite) // 4]
        axis.set_ylim(max(0.0, middle - 1.5 * (finite[-1] - middle) - 2.0), min(101.0, finite[-1] + 2.0))


def _draw_alpha(axis: Any, run: RunData) -> None:  # noqa: ANN401
    axis.plot(run.steps, run.alphas, color=_ALPHA, linewidth=1.6)
    axis.fill_between(run.steps, 0, run.alphas, color=_ALPHA, alpha=0.15, linewidth=0)
    axis.set_ylim(-0.4, 1.12)
    axis.set_yticks([0, 0.5, 1])
    axis.set_ylabel("alpha")
    for kind, y, marker, color in (("capture", -0.13, "|", "#8a8a8a"), ("promotion", -0.29, "|", _GOOD)):
        where = [event["capture_step"] for event in run.events.get(kind, ())]
        axis.plot(where, [y] * len(where), marker=marker, color=color, markersize=5, markeredgewidth=1.1,
                  linestyle="none")  # fmt: skip
        if where:
            text = "captures" if kind == "capture" else "known good"
            axis.annotate(text, (1, y), xycoords=("axes fraction", "data"), xytext=(4, -3),
                          textcoords="offset points", fontsize=7, color=color)  # fmt: skip


def _draw_incidents(axes: Any, run: RunData) -> None:  # noqa: ANN401
    """Faults, anomalies and rollbacks, over all panels."""
    loss, top = axes[0], ("data", "axes fraction")
    for index, fault in enumerate(run.events.get("fault", ())):
        kind = str(fault["name"]).partition("@")[0]
        for axis in axes:
            axis.axvline(fault["step"], color=_FAULT, linewidth=0.9, linestyle=(0, (2, 2)), zorder=2)
        side = _side(run, fault["step"])
        loss.annotate(f"{kind} injected", (fault["step"], 0.97 - 0.075 * (index % 3)), xycoords=top,
                      xytext=(4 * side, 0), textcoords="offset points", fontsize=7.5, color=_FAULT, va="top",
                      ha="left" if side > 0 else "right")  # fmt: skip
    anomalies = [event for event in run.events.get("verdict", ()) if not event["rollback"]]
    if anomalies:
        loss.plot([event["step"] for event in anomalies], [0.985] * len(anomalies), marker="v",
                  color=_FAULT, markersize=6, linestyle="none", transform=loss.get_xaxis_transform(),
                  label="anomaly")  # fmt: skip
    rollbacks = [event["report"] for event in run.events.get("rollback", ())]
    for number, report in enumerate(rollbacks):
        step, back = report["step"], report["restored_step"]
        for axis in axes:
            axis.axvline(step, color=_ROLLBACK, linewidth=1.1, zorder=3)
            axis.axvspan(
                back, step, facecolor="none", edgecolor=_ROLLBACK, hatch="////", alpha=0.25, linewidth=0
            )
        height = 0.70 - 0.1 * (number % 3)
        loss.annotate("", (back, height), (step, height), xycoords=top, textcoords=top,
                      arrowprops={"arrowstyle": "-|>", "color": _ROLLBACK, "linewidth": 1.4})  # fmt: skip
        text = f"rollback to {back}: {str(report['reason']).replace('_', ' ').lower()}"
        side = _side(run, step)
        loss.annotate(text, (step if side > 0 else back, height), xycoords=top, xytext=(4 * side, 0),
                      textcoords="offset points", fontsize=7.5, color=_ROLLBACK, va="center",
                      ha="left" if side > 0 else "right")  # fmt: skip
    if rollbacks:
        loss.plot([], [], color=_ROLLBACK, linewidth=1.4, label="rollback (hatched: steps lost)")


def _side(run: RunData, step: float) -> int:
    """Where a label goes: 1 is to the right of ``step``, -1 to the left because the edge is near."""
    return 1 if step < 0.75 * float(run.steps[-1]) else -1


def _title(run: RunData) -> str:
    summary, said = run.summary, [f"tolaria train {run.config['task']}"]
    settings = run.config["settings"]
    if summary["outcome"] != "none":
        said.append(f"a {settings['blueprint']} seed at {run.config['slot']}: {summary['outcome']}")
    said.append(f"{summary['steps']} steps in {summary['seconds']:.0f} s")
    if run.config["governor"] is None:
        said.append("no governor")
    else:
        count = summary["rollbacks"]
        said.append("no rollback" if not count else f"{count} rollback{'s' if count > 1 else ''}")
    if summary["interrupted"]:
        said.append("interrupted")
    return " · ".join(said)


def _smoothed(
    values: npt.NDArray[np.float64], steps: npt.NDArray[np.float64], restarts: set[int], weight: float = 0.06
) -> npt.NDArray[np.float64]:
    """Exponential mean of the logarithms, begun anew where a value is no number and after ``restarts``."""
    out, mean = np.full_like(values, np.nan), math.nan
    for index, value in enumerate(values):
        if index and steps[index - 1] in restarts:
            mean = math.nan
        if math.isfinite(value):
            mean = math.log(value) if math.isnan(mean) else mean + weight * (math.log(value) - mean)
            out[index] = math.exp(mean)
        else:
            mean = math.nan
    return out

"""``run.png``: one look at it tells what a run went through."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from tolaria._optional import require
from tolaria.runs.files import write_whole
from tolaria.runs.incidents import Incident, find_incidents
from tolaria.runs.record import Floats, RunRecord

# Okabe and Ito's colours, which most colour-blind people tell apart; every mark also has a shape of its own.
_TRAINING, _VALIDATION, _FAULT, _ROLLBACK, _GOOD = "#0072B2", "#222222", "#E69F00", "#D55E00", "#009E73"
_STAGES = {  # label, ribbon, background
    "DORMANT": ("host alone", "#d4d4d4", "#f6f6f6"),
    "GERMINATED": ("germinated", "#d4d4d4", "#f6f6f6"),
    "TRAINING": ("incubating", "#f3d98b", "#fdf6e0"),
    "BLENDING": ("blending", "#9fcfef", "#e6f2fb"),
    "FOSSILIZED": ("fossilized", "#8fd0b8", "#e6f4ee"),
    "CULLED": ("culled", "#cfb5cd", "#f4edf3"),
}
_WIDTH, _ACCURACY_HEIGHT = 11.0, 1.5  # inches
_MOST_ROWS = 5  # of incidents; what does not fit is counted
_LETTER = 0.0058  # width of a small letter, as a share of an axis: near enough to keep labels apart


def plot_run(folder: str | Path, out: str | Path | None = None) -> Path:
    """Draw the run in ``folder``.

    Loss (log scale), accuracy, alpha, the seed's stages as bands, and the governor's lane: captures, faults,
    anomalies, rollbacks. What a rollback took back is drawn pale and hatched.

    Args:
        folder: a run folder.
        out: the picture; ``run.png`` in the folder if None. The suffix chooses the format.

    Returns:
        Where the picture is.

    Raises:
        FileNotFoundError: ``folder`` is no run folder.
        MissingDependencyError: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", feature="plot_run", package="matplotlib", extra="train")
    run = RunRecord.read(Path(folder))
    incidents = place(find_incidents(run), run.last_step)
    rows = 1 + min(_MOST_ROWS, max((i.row for i in incidents), default=-1) + 1)
    heights = [0.26, 3.0, _ACCURACY_HEIGHT, 0.75, 0.21 * rows + 0.12]
    figure = figures.Figure(figsize=(_WIDTH, sum(heights) + 1.3), dpi=120, layout="constrained")
    figure.get_layout_engine().set(hspace=0.015, h_pad=0.03)
    ribbon, loss, accuracy, alpha, lane = figure.subplots(5, 1, sharex=True, height_ratios=heights)
    for axis in (loss, accuracy, alpha, lane):
        for stage, first, last in run.bands():
            axis.axvspan(first, last, color=_STAGES[stage][2], linewidth=0, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.5)
        axis.set_axisbelow(True)
    _draw_ribbon(ribbon, run)
    _draw_loss(loss, run)
    _draw_accuracy(accuracy, run)
    _draw_alpha(alpha, run)
    _draw_lane(lane, run, incidents, rows)
    _cross_panels((loss, accuracy, alpha), incidents)
    loss.legend(loc="upper right", fontsize=8, ncols=2, framealpha=0.9, edgecolor="#dddddd")
    figure.suptitle(_title(run), x=0.01, ha="left", fontsize=12, fontweight="bold")
    ribbon.set_title(_subtitle(run), loc="left", fontsize=9.5, color="#444444", pad=5)
    lane.set_xlabel("optimizer step")
    lane.set_xlim(0, run.last_step)
    target = Path(out) if out is not None else Path(folder) / "run.png"
    drawn = io.BytesIO()
    figure.savefig(drawn, format=target.suffix[1:] or "png", bbox_inches="tight", pad_inches=0.12)
    write_whole(target, drawn.getvalue())
    return target


def place(incidents: list[Incident], width: float) -> list[Incident]:
    """Give each incident a row in which its marks and its label touch no other's."""
    ends: list[float] = []  # where each row is taken up to
    for incident in incidents:
        label = (len(incident.text) * _LETTER + 0.012) * width
        left, right = incident.first - 0.005 * width, incident.last + label
        if right > width:  # the label stands to the left
            left, right = incident.first - label, incident.last + 0.01 * width
        row = next((r for r, end in enumerate(ends) if end <= left), len(ends))
        if row == len(ends):
            ends.append(right)
        ends[row] = right
        incident.row = row
    return incidents


# ------------------------------------------------------------------ panels


def _draw_ribbon(axis: Any, run: RunRecord) -> None:  # noqa: ANN401
    """The stages by name."""
    for stage, first, last in run.bands():
        label, colour, _ = _STAGES[stage]
        axis.axvspan(first, last, facecolor=colour, edgecolor="white", linewidth=1.0)
        if (last - first) / run.last_step > len(label) * 1.15 * _LETTER:
            axis.text((first + last) / 2, 0.47, label, fontsize=8.5, ha="center", va="center")
    axis.set_ylim(0, 1)
    axis.set_yticks([])
    axis.tick_params(axis="x", bottom=False)
    axis.spines[:].set_visible(False)


def _draw_loss(axis: Any, run: RunRecord) -> None:  # noqa: ANN401
    good = np.isfinite(run.losses) & (run.losses > 0)
    kept = np.where(good & ~run.undone, run.losses, np.nan)
    lost = np.where(good & run.undone, run.losses, np.nan)
    smooth = run.smoothed()
    validation = np.array([line["val_loss"] for line in run.validations], dtype=np.float64)
    guess = float(run.config["random_guess_loss"])
    axis.plot(run.steps, kept, color=_TRAINING, linewidth=0.6, alpha=0.35)
    axis.plot(run.steps, lost, color=_ROLLBACK, linewidth=0.6, alpha=0.3)
    axis.plot(run.steps, np.where(run.undone, np.nan, smooth), color=_TRAINING, linewidth=1.8,
              label="training loss")  # fmt: skip
    _draw_validations(axis, run, validation, label="validation loss")
    if run.undone.any():
        axis.plot(run.steps, np.where(run.undone, smooth, np.nan), color=_ROLLBACK, linewidth=1.4, alpha=0.6,
                  label="taken back by a rollback")  # fmt: skip
    axis.axhline(guess, color="#888888", linewidth=0.8, linestyle=(0, (4, 3)))
    axis.annotate("guessing", (0, guess), xycoords=("axes fraction", "data"), xytext=(4, 2),
                  textcoords="offset points", fontsize=7.5, color="#666666")  # fmt: skip
    axis.set_yscale("log")
    axis.set_ylabel("loss")
    drawn = np.concatenate((smooth, validation))
    drawn = drawn[np.isfinite(drawn) & (drawn > 0)]
    raw = run.losses[good]
    low = min([guess, *drawn.tolist(), *([float(np.quantile(raw, 0.02))] if len(raw) else [])])
    high = max([guess, *drawn.tolist()])
    axis.set_ylim(0.6 * low, high * max(1.5, (high / low) ** 0.22))  # the legend has the top to itself
    top = axis.get_xaxis_transform()
    outside = run.steps[good & (run.losses > axis.get_ylim()[1])]
    if len(outside):
        axis.plot(outside, np.full(len(outside), 0.985), marker="^", linestyle="none", color=_ROLLBACK,
                  markersize=5.5, transform=top, clip_on=False, label="loss beyond the scale")  # fmt: skip
    broken = run.steps[~np.isfinite(run.losses)]
    if len(broken):
        axis.plot(broken, np.full(len(broken), 0.985), marker="x", linestyle="none", color=_ROLLBACK,
                  markersize=5.5, markeredgewidth=1.6, transform=top, clip_on=False,
                  label="loss not finite")  # fmt: skip


def _draw_validations(axis: Any, run: RunRecord, values: Floats, label: str | None = None) -> None:  # noqa: ANN401
    """Points on a line; those that a rollback took back are hollow and off it, in the rollback's colour."""
    where = np.array([line["step"] for line in run.validations], dtype=np.float64)
    gone = run.undone_validations
    axis.plot(where[~gone], values[~gone], color=_VALIDATION, linewidth=0.9, marker="o", markersize=2.6,
              label=label)  # fmt: skip
    axis.plot(where[gone], values[gone], color=_ROLLBACK, linestyle="none", marker="o", markersize=2.6,
              mfc="none", markeredgewidth=0.7, alpha=0.8)  # fmt: skip


def _draw_accuracy(axis: Any, run: RunRecord) -> None:  # noqa: ANN401
    where = [line["step"] for line in run.validations]
    values = [float(line["val_accuracy"]) for line in run.validations]
    _draw_validations(axis, run, np.array(values, dtype=np.float64))
    ends = [phase["end_step"] for phase in run.summary["phases"]]
    tests: list[tuple[float, float, str]] = []
    looks = (
        ("host_test", ends[:1], "at step {}"),
        ("control_test", ends[-1:], "host alone"),
        ("test", ends[-1:], "at the end"),
    )
    for key, last, text in looks:
        figures = run.summary.get(key)
        if figures is not None and last:
            tests.append((float(last[0]), float(figures["val_accuracy"]), f"test, {text.format(last[0])}"))
    finite = sorted(v for v in [*values, *(value for _, value, _ in tests)] if math.isfinite(v))
    if finite:
        middle, best = finite[len(finite) // 4], finite[-1]
        axis.set_ylim(
            max(0.0, middle - 1.5 * (best - middle) - 2.0), min(100.5, best + 0.25 * (best - middle) + 1.0)
        )
    for at, value, name in tests:
        axis.plot([at], [value], marker="D", markersize=6, color=_TRAINING, markeredgecolor="white",
                  linestyle="none", zorder=6, clip_on=False)  # fmt: skip
        text = f"{name}: {value:.2f}%"
        side, drop = free_corner(axis, run.last_step, (at, value), text, (where, values))
        axis.annotate(text, (at, value), xytext=(7 * side, drop), textcoords="offset points", fontsize=8.5,
                      ha="left" if side > 0 else "right", va="center", color=_TRAINING, fontweight="bold",
                      zorder=7)  # fmt: skip
    axis.set_ylabel("accuracy (%)")


def free_corner(
    axis: Any,  # noqa: ANN401
    width: float,
    point: tuple[float, float],
    text: str,
    line: tuple[list[float], list[float]],
) -> tuple[int, int]:
    """Where beside a point its label lies clear of the line: (-1 left or 1 right, points upwards)."""
    low, high = axis.get_ylim()
    unit = (high - low) / (_ACCURACY_HEIGHT * 72.0)  # what a point of type is on this axis
    best, fewest = (-1, -11), math.inf
    for side in (-1, 1):
        start = point[0] + side * 0.008 * width
        end = start + side * len(text) * 1.25 * _LETTER * width
        if not 0 <= min(start, end) <= max(start, end) <= width:
            continue
        across = np.interp(np.linspace(start, end, 40), *line) if line[0] else np.array([])
        for drop in (-11, 11, -20, 20):
            middle = point[1] + drop * unit
            if not low + 5 * unit <= middle <= high - 5 * unit:
                continue
            hit = float(np.sum(np.abs(across - middle) < 7 * unit)) + 0.01 * abs(drop)
            if hit < fewest:
                best, fewest = (side, drop), hit
    return best


def _draw_alpha(axis: Any, run: RunRecord) -> None:  # noqa: ANN401
    axis.plot(run.steps, run.alphas, color=_TRAINING, linewidth=1.4)
    axis.fill_between(run.steps, 0, run.alphas, color=_TRAINING, alpha=0.15, linewidth=0)
    axis.set_ylim(-0.06, 1.12)
    axis.set_yticks([0, 0.5, 1])
    axis.set_ylabel("alpha")


def _draw_lane(axis: Any, run: RunRecord, incidents: list[Incident], rows: int) -> None:  # noqa: ANN401
    """Captures in the first row, below it every incident with its label."""
    axis.set_ylim(rows - 0.4, -0.6)
    axis.set_yticks(range(min(2, rows)), ("captures", "incidents")[:rows], fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False)
    if run.config["governor"] is None:
        axis.text(
            0.5 * run.last_step, 0, "nobody watched over this run", fontsize=8, ha="center", va="center"
        )
    captures = run.captures()
    size = max(2.0, min(5.0, 500.0 / (sum(map(len, captures.values())) + 1)))
    marks = {
        "known good": ("o", _GOOD),
        "discarded": ("o", "white"),
        "on probation at the end": ("D", "white"),
    }
    for name, steps in captures.items():
        marker, face = marks[name]
        axis.plot(steps, [0] * len(steps), marker=marker, linestyle="none", markersize=size, mfc=face,
                  mec=_GOOD, clip_on=False)  # fmt: skip
    signs = {
        "known good": "\N{BLACK CIRCLE}", "discarded": "\N{WHITE CIRCLE}",
        "on probation at the end": "\N{WHITE DIAMOND}",
    }  # fmt: skip
    said = "   ".join(f"{signs[name]} {name}" for name, steps in captures.items() if steps)
    if said:
        axis.annotate(said, (1, 0), xycoords="axes fraction", xytext=(0, -23), textcoords="offset points",
                      fontsize=8.5, color=_GOOD, va="top", ha="right", annotation_clip=False,
                      in_layout=False)  # fmt: skip
    for incident in incidents:
        if incident.row < _MOST_ROWS:
            _draw_incident(axis, incident, run.last_step)
    hidden = sum(incident.row >= _MOST_ROWS for incident in incidents)
    if hidden:
        axis.annotate(f"and {hidden} more", (0, 0), xycoords="axes fraction", xytext=(0, -23),
                      textcoords="offset points", fontsize=8.5, color=_ROLLBACK, va="top",
                      annotation_clip=False)  # fmt: skip


def _draw_incident(axis: Any, incident: Incident, width: float) -> None:  # noqa: ANN401
    row = incident.row + 1
    if incident.rollback is not None:
        start, back = float(incident.rollback["step"]), float(incident.rollback["restored_step"])
        axis.annotate("", (back, row), (start, row),
                      arrowprops={"arrowstyle": "-|>", "color": _ROLLBACK, "linewidth": 1.6,
                                  "shrinkA": 0, "shrinkB": 0})  # fmt: skip
    axis.plot(incident.anomalies, [row] * len(incident.anomalies), marker="v", color=_ROLLBACK,
              markersize=5.5, mfc="white", linestyle="none", clip_on=False, zorder=5)  # fmt: skip
    axis.plot(incident.faults, [row] * len(incident.faults), marker="X", color=_FAULT, markersize=7,
              mec="#7a5200", markeredgewidth=0.6, linestyle="none", clip_on=False, zorder=6)  # fmt: skip
    right = incident.last + (len(incident.text) * _LETTER + 0.012) * width <= width
    axis.annotate(incident.text, (incident.last if right else incident.first, row),
                  xytext=(7 if right else -7, 0), textcoords="offset points", fontsize=8,
                  va="center_baseline", ha="left" if right else "right", color="#8a3c00",
                  annotation_clip=False)  # fmt: skip


def _cross_panels(axes: Any, incidents: list[Incident]) -> None:  # noqa: ANN401
    """What happened, as lines and hatched spans over every panel."""
    for incident in incidents:
        for axis in axes:
            for step in incident.faults:
                axis.axvline(step, color=_FAULT, linewidth=1.0, linestyle=(0, (2, 2)), zorder=2)
            if incident.rollback is None:
                continue
            step, back = incident.rollback["step"], incident.rollback["restored_step"]
            axis.axvline(step, color=_ROLLBACK, linewidth=1.0, zorder=2)
            axis.axvspan(back, step, facecolor="none", edgecolor=_ROLLBACK, hatch="////", alpha=0.18,
                         linewidth=0, zorder=1)  # fmt: skip


def _title(run: RunRecord) -> str:
    summary = run.summary
    said = [f"tolaria train {run.config['task']}"]
    if summary["outcome"] != "none":
        said.append(
            f"{run.config['settings']['blueprint']} seed at {run.config['slot']} {summary['outcome']}"
        )
    count = summary["rollbacks"]
    said.append(
        "no governor" if run.config["governor"] is None
        else "no rollback" if not count else f"{count} rollback{'s' if count > 1 else ''}"
    )  # fmt: skip
    if summary["interrupted"]:
        said.append("interrupted")
    if summary["diverged"] is not None:
        said.append("diverged")
    return " \N{MIDDLE DOT} ".join(said)


def _subtitle(run: RunRecord) -> str:
    summary = run.summary
    said = [f"{summary['steps']} steps in {summary['seconds']:.0f} s"]
    host, end = summary.get("host_test"), summary.get("test")
    if end is not None:
        accuracy = f"test accuracy {float(end['val_accuracy']):.2f}%"
        alone = summary.get("control_test")
        if alone is not None:
            accuracy += f" (host alone for the same steps: {float(alone['val_accuracy']):.2f}%)"
        elif host is not None and summary["phases"]:
            accuracy += f" (at step {summary['phases'][0]['end_step']}: {float(host['val_accuracy']):.2f}%)"
        said.append(accuracy)
    seeds, hosts = summary["seed_parameters"], summary["host_parameters"]
    said.append(f"{hosts:,} parameters" + (f" + {seeds:,} in the seed" if seeds else ""))
    said.append(f"{run.config.get('device', 'cpu')}, rng seed {run.config.get('rng_seed', '?')}")
    return " \N{MIDDLE DOT} ".join(said)

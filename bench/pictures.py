"""Pictures of the benches: ratios over sizes with the ceiling, and what guarding costs."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator
from summary import Group, Session

PANELS = {
    "blend, forward + backward": "blend/both/{}/float32/contiguous/all threads",
    "blend, with grad_alpha": "blend/both+alpha/{}/float32/contiguous/all threads",
    "straight_through, forward + backward": "straight_through/both/{}/float32/contiguous/all threads",
    "seed_gate, forward + backward": "seed_gate/both/{}/float32/contiguous/all threads",
    "tensor_stats, one tensor": "tensor_stats/one tensor/{}/float32/all threads",
    "snapshot_capture_, one tensor": "snapshot/capture/one tensor/{}/float32/all threads",
}
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
COLORS = {
    "reference": "tab:gray",
    "compiled": "tab:purple",
    "ceiling (cold)": "tab:red",
    "ceiling (warm)": "tab:orange",
    "ceiling (autograd)": "tab:olive",
}
OTHERS = ("tab:blue", "tab:green", "tab:brown", "tab:cyan")


def _bytes(size: str) -> int:
    number, unit = size.split()
    return int(number) * UNITS[unit]


def _sweep(session: Session, pattern: str) -> list[tuple[int, Group]]:
    """Groups of a panel by size."""
    head, tail = pattern.split("{}")
    found = [
        (_bytes(name[len(head) : -len(tail)]), group)
        for name, group in session.groups.items()
        if name.startswith(head) and name.endswith(tail) and name.count("/") == pattern.count("/")
    ]
    return sorted(found, key=lambda item: item[0])


def _panel(axes: Axes, title: str, groups: list[tuple[int, Group]]) -> None:
    names = sorted(
        {n for _, g in groups for n in g.timings if n != "fused"}, key=lambda n: (n.startswith("ceiling"), n)
    )
    spare = iter(OTHERS)
    for name in names:
        found = [(size, g.ratio(name, "fused")) for size, g in groups]
        points = [(size, r) for size, r in found if r is not None]
        sizes = [size for size, _ in points]
        is_ceiling = name.startswith("ceiling")
        color = COLORS.get(name) or next(spare)
        style = "--" if is_ceiling else "-"
        axes.plot(
            sizes, [r.value for _, r in points], style, color=color, marker=".", label=name, linewidth=1.4
        )
        axes.fill_between(
            sizes, [r.low for _, r in points], [r.high for _, r in points], color=color, alpha=0.13
        )
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=8))
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(_size_label))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(True, which="major", alpha=0.3)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, framealpha=0.8)


def _size_label(value: float, _position: object) -> str:
    for unit in ("GiB", "MiB", "KiB"):
        if value >= UNITS[unit]:
            return f"{value / UNITS[unit]:g} {unit}"
    return f"{value:g} B"


def ratios(session: Session, path: Path) -> bool:
    """Time over that of ``fused`` against the bytes of a tensor, one panel an op."""
    panels = {title: _sweep(session, pattern) for title, pattern in PANELS.items()}
    panels = {title: groups for title, groups in panels.items() if len(groups) > 1}
    if not panels:
        return False
    rows = -(-len(panels) // 3)
    figure, grid = pyplot.subplots(rows, 3, figsize=(13, 3.7 * rows), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, groups) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, title, groups)
    for row in grid:
        row[0].set_ylabel("time / time of fused")
    figure.suptitle(
        "Above 1: fused is faster. float32, all threads, 95% intervals; bytes of one tensor", fontsize=11
    )
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    return True


def _percents(group: Group, impl: str) -> tuple[float, float, float]:
    """What ``impl`` adds to an unguarded step, in percent, with its interval; ``noise``: a copy."""
    if impl == "noise":
        step = group.timings["unguarded"].median
        value, low, high = (100 * x / step for x in group.timings["unguarded"].info["noise"])
        return value, low, high
    interval = 10 if impl == "every 10" else 100
    info = group.timings[impl].info
    low, high = info[f"overhead_interval_{interval}"]
    return info[f"overhead_percent_{interval}"], low, high


def overheads(session: Session, path: Path) -> bool:
    """Percent that guarding adds to a step, per network."""
    groups = {n.removeprefix("step/"): g for n, g in session.groups.items() if n.startswith("step/")}
    if not groups:
        return False
    bars = {
        "two unguarded copies (noise)": ("noise", "lightgray"),
        "fused, capture every 100": ("fused", "tab:blue"),
        "fused, capture every 10": ("every 10", "tab:cyan"),
        "reference, capture every 100": ("reference", "tab:gray"),
    }
    figure, axes = pyplot.subplots(figsize=(9, 4))
    for place, (label, (impl, color)) in enumerate(bars.items()):
        found = [_percents(group, impl) for group in groups.values()]
        values = [value for value, _, _ in found]
        errors = [[value - low for value, low, _ in found], [high - value for value, _, high in found]]
        spots = [i + 0.2 * (place - 1.5) for i in range(len(groups))]
        axes.bar(spots, values, width=0.19, color=color, label=label)
        axes.errorbar(spots, values, yerr=errors, fmt="none", ecolor="black", elinewidth=1, capsize=3)
        for spot, (value, _, high) in zip(spots, found, strict=True):
            top = max(value, high, 0.0)
            axes.annotate(
                f"{value:.3g}%", (spot, top), (0, 3), textcoords="offset points", ha="center", size=8
            )
    steps = [f"{n}\n{1e3 * g.timings['unguarded'].median:.3g} ms a step" for n, g in groups.items()]
    axes.set_xticks(range(len(groups)), steps)
    axes.set_ylabel("% of an unguarded step")
    axes.set_yscale("symlog", linthresh=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.axhline(0, color="black", linewidth=1)
    axes.axhline(1, color="tab:red", linestyle="--", linewidth=1)
    axes.margins(y=0.2)
    axes.grid(True, axis="y", alpha=0.3)
    figure.legend(fontsize=8, loc="lower center", ncol=4)
    axes.set_title("What the governor costs (check every step); bars: 95% intervals, red: 1%", fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    return True


def draw(session: Session, folder: Path) -> list[tuple[str, str]]:
    """Draw what there are figures for; the files' names with a description."""
    wanted = [
        ("bench-ratios.png", ratios, "Time of each implementation over that of the fused op, against size"),
        ("bench-steps.png", overheads, "Overhead of a guarded training step, in percent"),
    ]
    return [(name, text) for name, make, text in wanted if make(session, folder / name)]

"""The page ``docs/benchmarks.md``: bars, whole steps, ops, losses, counts; and the table of everything."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import bars
from summary import Group, Session, Timing

NOT_RIVALS = ("fused", "reference", "compiled", "every 10", "unguarded", "unguarded again")
COUNTS = Path(__file__).with_name("counts.json")
_WHOLE = ("step/", "capture/", "rollback/", "memory/", "governor.step/")
LEAST_BYTES = 1 << 20
"""A case that moves less is bound by its calls: shares of a ceiling are left out."""
_SIZES_ON_PAGE = ("4 KiB", "128 KiB", "8 MiB", "64 MiB")
INTRODUCTION = """\
# Benchmarks

Made by `pip install ".[bench]" && python bench/run.py` (nine minutes; `--quick`: two); nobody edits the
numbers. [benchmarks.csv](benchmarks.csv) has all of them.

- `fused` is tolaria's compiled op; `reference` the same in plain PyTorch, `torch.compile` that reference
  compiled; the *strongest alternative* is the fastest other way we know, even where it does less.
- All results are checked before anything is timed. Then each round times every implementation once, in an
  order drawn anew. Times are medians; a ratio is time over that of `fused` (**above 1: `fused` is faster**)
  with the middle 95% of what resampled rounds give.
- A *ceiling* makes the same passes over memory without the arithmetic: *cold* into fresh tensors of torch's
  allocator, *warm* into used memory. Bars take the cold one; where `fused` beats that, the warm one. With
  *autograd*: the warm one with a graph of one operator on one element in it, for what the engine takes."""


def machine(session: Session) -> list[str]:
    """What the numbers depend on."""
    first, last = session.machines[0], session.machines[-1]
    caches = ", ".join(f"{level} {size}" for level, size in first.get("caches", {}).items())
    keys = ("load_at_start", "load_at_end")
    loads = [m[key] for m in session.machines for key in keys if m.get(key) is not None]
    load = f"{min(loads):.1f} to {max(loads):.1f}" if loads else "unknown"
    gpu = first.get("gpu")
    return [
        f"On {first['processor_name']}, {first['threads']} threads, {first.get('capability')}, {caches}; "
        f"torch {first['torch']}, tolaria {first['tolaria']}, {first['when'][:10]} to {last['when'][:10]}.",
        f"Load average before and after: {load}. "
        + (f"GPU: {gpu}." if gpu else "**GPU seconds are unmeasured**: there was none."),
    ]


def rivals(group: Group) -> Iterator[tuple[str, Timing]]:
    """Alternatives, fastest first."""
    found = [(n, t) for n, t in group.timings.items() if n not in NOT_RIVALS and not n.startswith("ceiling")]
    yield from sorted(found, key=lambda item: item[1].median)


def _percent(group: Group) -> str:
    """Share of each ceiling that ``fused`` reaches; of a small case it says nothing."""
    fused = group.timings["fused"]
    if fused.info.get("moved_bytes", 0) < LEAST_BYTES:
        return ""
    shares = [
        f"{100 * group.timings[name].median / fused.median:.0f}"
        for name in ("ceiling (cold)", "ceiling (warm)", "ceiling (autograd)")
        if name in group.timings
    ]
    return " / ".join(shares)


def op_line(group: Group) -> str:
    """One case as a row."""
    fused = group.timings["fused"]
    low, high = (1e6 * q for q in fused.quartiles)
    best = next(rivals(group), None)
    cells = [
        group.name.replace("/float32", "").replace("/contiguous", "").replace("/all threads", ""),
        f"{1e6 * fused.median:,.1f} ({low:,.1f}-{high:,.1f})",
        str(group.ratio("reference", "fused") or ""),
        str(group.ratio("compiled", "fused") or group.absent.get("compiled", "").split(":")[0]),
        f"{best[0]}: {group.ratio(best[0], 'fused')}" if best else "",
        f"{fused.bytes_per_second / 1e9:.1f}" if fused.info.get("moved_bytes") else "",
        _percent(group),
    ]
    return "| " + " | ".join(cells) + " |"


def _on_page(group: Group) -> bool:
    name = group.name
    if (
        name.startswith(_WHOLE)
        or "fused" not in group.timings
        or "channels_last" in name
        or "1 thread" in name
    ):
        return False
    if name.startswith(
        ("blend/backward", "straight_through/backward", "seed_gate/backward", "seed_gate/forward")
    ):
        return False
    parts = name.split("/")
    sizes = [part for part in parts if part.endswith("iB")]
    is_headline = name.startswith("blend/both")
    if "bfloat16" in parts:
        return is_headline and sizes[0] == "8 MiB"
    if sizes and not is_headline:
        return sizes[0] == "8 MiB"
    return not sizes or sizes[0] in _SIZES_ON_PAGE


def ops_table(session: Session) -> list[str]:
    """The most telling cases."""
    lines = [
        "## Ops",
        "",
        "float32, contiguous, all threads unless named. GB/s: of what must be read and written at least.",
        "`reference` is slower than the best eager form where it promises more. `blend`: no NaN of an unused",
        "side passes (`lerp` lets it) and nobody waits for alpha (`branch` looks at it on the host).",
        "`classification_metrics_`: loss, top-5 and counts per class, with argmax's order of ties and NaN",
        "(`eager`: loss and hits; `eager, all`: the rest, too). `governor_step_`: its C++ bit for bit; the",
        "detectors beside it look at one number on the host and order nothing.",
        "",
        "| case | fused, us (quartiles) | reference | torch.compile | strongest alternative | GB/s "
        "| % of ceiling, cold / warm / with autograd |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    return lines + [op_line(group) for group in session.groups.values() if _on_page(group)]


def _microseconds(gap: list[float]) -> str:
    value, low, high = (1e6 * x for x in gap)
    return f"{value:+.0f} ({low:+.0f} to {high:+.0f})"


def steps_table(session: Session) -> list[str]:
    """What guarding costs a training step."""
    lines = [
        "## Whole training steps",
        "",
        "Each copy trains a few steps in a row, the copies in turn; differences are of medians of one round",
        "(95%). *Noise*: how far two unguarded copies are apart; a smaller overhead is not told from none.",
        "At an interval, a capture's share is added; *called*: time inside `governor.step` alone.",
        "",
        "| network | step, ms | noise, us | clean step, us | capture every 100 (called) | every 10 (called) "
        "| reference, 100 | stall of a capture, ms |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, group in session.groups.items():
        if not name.startswith("step/") or "fused" not in group.timings:
            continue
        fused, often, slow = (group.timings[n].info for n in ("fused", "every 10", "reference"))
        noise = group.timings["unguarded"].info["noise"]
        stall = often.get("stall_capture") or fused.get("stall_capture")
        cells = [
            name.removeprefix("step/"),
            f"{1e3 * group.timings['unguarded'].median:.2f}",
            _microseconds(noise),
            _microseconds(fused["clean_gap"]),
            f"{fused['overhead_percent_100']:+.2f}% ({fused['direct_percent_100']:.2f}%)",
            f"{often['overhead_percent_10']:+.2f}% ({often['direct_percent_10']:.2f}%)",
            f"{slow['overhead_percent_100']:+.2f}%",
            f"{1e3 * stall:.2f}" if stall else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *memory_table(session)]


def memory_table(session: Session) -> list[str]:
    """Captures, rollbacks and memory as a user meets them."""
    lines = [
        "| network | capture, ms | clone + deepcopy | rollback, ms | load_state_dict | slots | peak, MiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in [n.removeprefix("capture/") for n in session.groups if n.startswith("capture/")]:
        capture, rollback = session.groups[f"capture/{name}"], session.groups.get(f"rollback/{name}")
        memory = session.groups.get(f"memory/{name}")
        cells = [
            name,
            f"{1e3 * capture.timings['fused'].median:.2f}",
            str(capture.ratio("clone + deepcopy", "fused")),
        ]
        cells += (
            [f"{1e3 * rollback.timings['fused'].median:.2f}", str(rollback.ratio("load_state_dict", "fused"))]
            if rollback
            else ["", ""]
        )
        if memory:
            plain, ours = memory.timings["unguarded"].info, memory.timings["fused"].info
            more = (ours["peak_bytes"] - plain["peak_bytes"]) / 2**20
            cells += [
                f"{ours['slot_bytes'] / 2**20:.1f}",
                f"{more:+.0f} MiB on {plain['peak_bytes'] / 2**20:.0f}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def wins_and_losses(session: Session, most: int = 10) -> list[str]:
    """How often ``fused`` is ahead of another implementation and how often behind, and the largest losses."""
    ahead, losses = 0, []
    for group in session.groups.values():
        if group.name.startswith(("step/", "memory/")) or "fused" not in group.timings:
            continue
        for name in group.timings:
            over = group.ratio(name, "fused")
            if over is None or name == "fused" or name.startswith("ceiling"):
                continue
            ahead += over.low > 1
            if over.high < 1:
                losses.append((over.value, f"- {group.name}: {name} {over}"))
    lines = [
        "## Wins and losses",
        "",
        f"Of all pairs of `fused` and another implementation, `fused` is ahead in {ahead} and behind in "
        f"{len(losses)}; elsewhere the interval holds 1.",
    ]
    return lines + (["", *(text for _, text in sorted(losses)[:most])] if losses else [])


def absences(session: Session) -> list[str]:
    """What did not run, and why; each reason once."""
    reasons: dict[str, str] = {}
    for group in session.groups.values():
        for name, why in group.absent.items():
            reasons.setdefault(f"- {name} ({group.name.split('/')[0]}): {why[:140]}", group.name)
    return ["", "Not there:", "", *reasons] if reasons else []


def counts_table() -> list[str]:
    """Counts from the virtual device, as ``bench/counts.py`` left them."""
    lines = ["## Counts on a virtual CUDA device", ""]
    if not COUNTS.is_file():
        return [*lines, "Not counted; see `bench/counts.py`."]
    data: dict[str, Any] = json.loads(COUNTS.read_text())
    lines += [
        f"Counted by `bench/counts.py`, not timed ({data['about']}). Launches and bytes are our kernels';",
        "`torch`: launches of torch's own operators beside them.",
        "",
        "| work | launches | torch | host syncs | copies | allocations | kernel bytes read / written |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in data["rows"]]


def everything(session: Session) -> Iterable[list[object]]:
    """Every figure, one row an implementation."""
    yield [
        "group",
        "implementation",
        "by",
        "rounds",
        "median_s",
        "q1_s",
        "q3_s",
        "bytes",
        "ratio",
        "low",
        "high",
    ]
    for group in session.groups.values():
        for name, timing in group.timings.items():
            over = group.ratio(name, "fused")
            figures = [f"{x:.6g}" for x in (timing.median, *timing.quartiles)]
            ratios = [f"{x:.4g}" for x in (over.value, over.low, over.high)] if over else [""] * 3
            moved = timing.info.get("moved_bytes", 0)
            yield [group.name, name, timing.info.get("by", ""), len(timing.samples), *figures, moved, *ratios]


def write(session: Session, docs: Path) -> None:
    """Write the page, the pictures and the table of everything below ``docs``."""
    (docs / "images").mkdir(parents=True, exist_ok=True)
    drawn: list[tuple[str, str]] = []
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures: there is no matplotlib")
    else:
        import pictures

        drawn = pictures.draw(session, docs / "images")
    parts = [
        [INTRODUCTION, "", *machine(session)],
        ["## The bars", "", *bars.table(session)],
        steps_table(session),
        [f"![{text}](images/{name})" for name, text in drawn],
        ops_table(session) + absences(session),
        wins_and_losses(session),
        counts_table(),
    ]
    text = "\n\n".join("\n".join(part) for part in parts if part) + "\n"
    (docs / "benchmarks.md").write_text(text)
    with (docs / "benchmarks.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(everything(session))
    print(f"wrote {docs / 'benchmarks.md'}, benchmarks.csv and {len(drawn)} pictures")

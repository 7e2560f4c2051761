"""Turn pytest-benchmark's JSON into ``docs/benchmarks.md``: medians, quartiles, ratios, bytes per second.

Usage: ``pytest bench --benchmark-json=bench.json && python bench/report.py bench.json > docs/benchmarks.md``
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from typing import Any

Row = dict[str, Any]


def grouped(benchmarks: list[Row]) -> dict[str, dict[str, Row]]:
    """Rows by group and implementation."""
    groups: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in benchmarks:
        groups[row["group"]][row["extra_info"]["impl"]] = row
    return groups


def line(impl: str, row: Row, fused: float | None, ceiling: float | None) -> str:
    """One line of a group's table."""
    stats, moved = row["stats"], row["extra_info"]["moved_bytes"]
    median = stats["median"]
    cells = [
        impl,
        f"{median * 1e6:,.1f}",
        f"{stats['q1'] * 1e6:,.1f} to {stats['q3'] * 1e6:,.1f}",
        f"{moved / median / 1e9:.1f}",
        f"{median / fused:.2f}" if fused else "",
        f"{100 * ceiling / median:.0f}" if ceiling else "",
    ]
    return "| " + " | ".join(cells) + " |"


def page(data: dict[str, Any]) -> str:
    """The whole page."""
    machine = data["machine_info"]
    lines = [
        "# Benchmarks",
        "",
        f"Measured {data['datetime'][:10]} on {machine.get('processor_name', 'an unknown processor')}, "
        f"{machine.get('threads')} threads, torch {machine.get('torch')}, "
        f"load before the run {machine.get('load_at_start') or 0:.1f}. GPU seconds are unmeasured.",
        "",
        "Ratio: time over that of `fused` (above 1: fused is faster). Ceiling: a plain operation with the",
        "same reads and writes, in the same run; its share says how close a row comes.",
    ]
    for group, rows in sorted(grouped(data["benchmarks"]).items()):
        fused = rows["fused"]["stats"]["median"] if "fused" in rows else None
        ceiling = rows["ceiling"]["stats"]["median"] if "ceiling" in rows else None
        lines += ["", f"## {group}", "", "| | median (us) | quartiles (us) | GB/s | ratio | % of ceiling |"]
        lines.append("|---|---:|---:|---:|---:|---:|")
        ordered = sorted(rows.items(), key=lambda item: item[1]["stats"]["median"])
        lines += [line(impl, row, fused, ceiling) for impl, row in ordered]
    return "\n".join(lines)


if __name__ == "__main__":
    with open(sys.argv[1]) as source:
        print(page(json.load(source)))

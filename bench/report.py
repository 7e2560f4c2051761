"""Turn the benches' JSON into ``docs/benchmarks.md``, its pictures and ``docs/benchmarks.csv``.

    python bench/report.py JSON...            writes the page, the pictures and the table of everything
    python bench/report.py --bars JSON...     prints the bars: wanted, measured, met or not
    python bench/report.py --list JSON...     prints every group, implementation by implementation
    (with --docs FOLDER the page is written, too)

Several files are merged; a group measured twice comes from the later file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when it is run from elsewhere

import bars
from summary import Group, Session, read


def listing(group: Group) -> list[str]:
    """One group as text, fastest first."""
    lines = [group.name]
    for name, timing in sorted(group.timings.items(), key=lambda item: item[1].median):
        low, high = (1e6 * q for q in timing.quartiles)
        over = group.ratio(name, "fused") or ""
        by = f" by {timing.info['by']}" if "by" in timing.info else ""
        lines.append(
            f"  {name + by:34} {timing.median * 1e6:12,.1f} us  [{low:,.1f} to {high:,.1f}]"
            f"  {timing.bytes_per_second / 1e9:6.1f} GB/s  {over!s:>20} x fused"
        )
    return lines + [f"  {name}: {why}" for name, why in group.absent.items()]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", nargs="+", help="what pytest --benchmark-json wrote")
    parser.add_argument("--bars", action="store_true", help="print the table of bars")
    parser.add_argument("--list", action="store_true", help="print every group")
    parser.add_argument("--docs", type=Path, help="where the page goes (default: docs/)")
    arguments = parser.parse_args()
    try:
        session: Session = read(arguments.json)
    except (OSError, ValueError, KeyError) as error:
        parser.error(
            f"JSON: expected files that pytest --benchmark-json wrote, got {arguments.json}: {error}"
        )
    if arguments.list:
        for group in session.groups.values():
            print("\n".join(listing(group)))
    if arguments.bars:
        print("\n".join(bars.table(session)))
    if arguments.docs or not (arguments.list or arguments.bars):
        import page

        page.write(session, arguments.docs or Path(__file__).resolve().parents[1] / "docs")


if __name__ == "__main__":
    main()

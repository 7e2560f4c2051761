"""The page itself: one HTML file with its data, its script and the chart library in it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from urllib.parse import quote

import tolaria
from tolaria._optional import require
from tolaria.report.compare import compare
from tolaria.report.figures import lane, panels, undone_spans
from tolaria.report.incidents import tell
from tolaria.report.lines import Line
from tolaria.report.overview import judge_note, name_of, settings, tiles, verdict_of
from tolaria.report.reading import RAW, RunReading
from tolaria.report.words import plain

MARK = b'<meta name="generator" content="tolaria report">'
"""Near the top of every page: a file that has it may be written over by another."""
_SCRIPTS = ("text.js", "charts.js", "tables.js", "main.js")


def view_of(run: RunReading, links: Mapping[str, str], name: str | None = None) -> Line:
    """Everything that the page shows of a run, as JSON values."""
    incidents = tell(run)
    sentence, kind = verdict_of(run, incidents)
    return {
        "name": name_of(run) if name is None else name,
        "task": plain(run.config.get("task", "")),
        "verdict": sentence, "kind": kind, "tiles": tiles(run), "notes": run.notes(),
        "incidents": incidents, "undone": undone_spans(run), "lane": lane(run), "panels": panels(run),
        "judge": judge_note(run), "settings": settings(run), "links": [[k, v] for k, v in links.items()],
        "last": max(run.last_step, run.log.last_step, 1),
    }  # fmt: skip


def data_of(runs: Sequence[RunReading], beside: Path | None) -> Line:
    """The data of a page about ``runs``.

    Args:
        runs: read as far as is to be shown.
        beside: where the page will lie; None: a server serves the files under ``files/``.
    """
    names = _apart([name_of(run) for run in runs])
    views = [view_of(run, _links(run, beside), name) for run, name in zip(runs, names, strict=True)]
    return {
        "runs": views,
        "comparison": compare(runs, names) if len(runs) > 1 else None,
        "live": beside is None,
        "version": tolaria.__version__,
    }


def _apart(names: list[str]) -> list[str]:
    """Names that differ; the same ones are numbered."""
    return [f"{name} ({at})" if names.count(name) > 1 else name for at, name in enumerate(names, 1)]


def _links(run: RunReading, beside: Path | None) -> dict[str, str]:
    there = [name for name in dict.fromkeys((*RAW, *run.files)) if (run.folder / name).is_file()]
    if beside is None:
        return {plain(name): f"files/{quote(name)}" for name in there}
    folder = _relative(run.folder.resolve(), beside.resolve())
    return {plain(name): f"./{quote((folder / name).as_posix())}" for name in there}


def _relative(folder: Path, start: Path) -> Path:
    shared = 0
    for mine, other in zip(folder.parts, start.parts, strict=False):
        if mine != other:
            break
        shared += 1
    return Path(*[".."] * (len(start.parts) - shared), *folder.parts[shared:])


def render(data: Line) -> bytes:
    """The page, UTF-8.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    chart = require("plotly.offline", feature="a report", package="plotly", extra="report")
    scripts = [str(chart.get_plotlyjs()), "\n".join(_asset(name) for name in _SCRIPTS)]
    scripts = [script.replace("</script", "<\\/script") for script in scripts]
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    connect = "'self'" if data["live"] else "'none'"
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    title = html.escape(", ".join(run["name"][:80] for run in data["runs"][:4]))
    head = _asset("page.html").replace("{{policy}}", html.escape(policy)).replace("{{title}}", title)
    head = head.replace("{{style}}", _asset("page.css")).replace("{{mark}}", MARK.decode())
    before, after = head.split("{{scripts}}")
    parts = [before, f'<script type="application/json" id="data">{as_script(data)}</script>\n']
    parts += [f"<script>{script}</script>\n" for script in scripts]
    return "".join([*parts, after]).encode()


def as_script(data: object) -> str:
    """JSON that may stand inside a ``script`` element, and in JavaScript of any age."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # not ASCII: escaped, U+2028 too
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _asset(name: str) -> str:
    return (resources.files("tolaria.report") / "assets" / name).read_text(encoding="utf-8")

"""Code on the pages runs, links lead somewhere, and no page is too long."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
RUN_ELSEWHERE = "integrations"  # with the packages that they are about: tests/integrations
BLOCKS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    if page.parent.name != RUN_ELSEWHERE
    for number, code in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    )
]


@pytest.mark.parametrize("code", BLOCKS)
def test_code_on_a_page_runs(code, monkeypatch):
    from tolaria.tasks import spec

    monkeypatch.setattr(spec, "_TASKS", dict(spec._TASKS))  # a page may register a task
    exec(compile(code, "page", "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_is_short(page):
    most = 170 if page.name == "benchmarks.md" else 150  # that one is a page of tables
    assert len(page.read_text(encoding="utf-8").splitlines()) <= most

"""The code on the pages about trainers runs, with the packages that they are about."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from trainers import need

PAGES = sorted((Path(__file__).resolve().parents[2] / "docs" / "integrations").glob("*.md"))
BLOCKS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    )
]


@pytest.mark.parametrize("code", BLOCKS)
def test_code_on_a_page_runs(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for line in re.findall(r"^(?:from|import) ([\w.]+)", code, re.MULTILINE):
        if not line.startswith("tolaria"):
            need(line)
    exec(compile(code, "page", "exec"), {"__name__": "page"})

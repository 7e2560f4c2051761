"""The benches run, and their figures become a page: one tiny case of each."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import run

ROOT = Path(__file__).resolve().parents[2]
BENCHES = sorted(
    (path.name, name)
    for path in ROOT.glob("bench/*/bench_*.py")
    for name in re.findall(r"^def (bench_\w+)", path.read_text(), re.MULTILINE)
)
pytest.importorskip("pytest_benchmark")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The JSON of ``pytest bench --smoke``."""
    path = tmp_path_factory.mktemp("bench") / "smoke.json"
    command = [sys.executable, "-m", "pytest", "bench", "--smoke", "-q", f"--benchmark-json={path}"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, env=alone, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return path


@pytest.mark.parametrize(("file", "bench"), BENCHES)
def test_every_bench_has_a_case(measured, file, bench):
    names = {row["fullname"] for row in json.loads(measured.read_text())["benchmarks"]}
    assert any(f"/{file}::{bench}[" in name for name in names), names


def test_the_page_holds_the_figures(measured, tmp_path):
    command = [sys.executable, "bench/report.py", str(measured), "--docs", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| digits CNN |" in page
    assert "| governor_step_/n=1 |" in page
    assert "not measured" in page  # of the bars, most are out of a smoke test's reach
    rows = (tmp_path / "benchmarks.csv").read_text().splitlines()
    assert len(rows) == 1 + len(json.loads(measured.read_text())["benchmarks"])


def test_the_source_tree_is_not_on_the_path_of_what_is_measured(monkeypatch, tmp_path):
    """``python -m pytest`` puts its folder there, and the root's would hide the installed package."""
    seen = {}

    def popen(command, *, cwd, **options):
        seen.update(command=command, cwd=Path(cwd))
        return real_popen([sys.executable, "-c", ""], cwd=cwd, **options)

    real_popen = subprocess.Popen
    monkeypatch.setattr(run.subprocess, "Popen", popen)
    monkeypatch.chdir(tmp_path)
    assert run.run("ops", [ROOT / "bench" / "ops" / "bench_blend.py"], Path("."), [])
    assert not (seen["cwd"] / "tolaria").exists()
    assert f"--benchmark-json={tmp_path.resolve() / 'ops.json'}" in seen["command"]


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_a_report_of_no_results_says_what_it_wants(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    if text is not None:
        file.write_text(text)
    done = subprocess.run(
        [sys.executable, "bench/report.py", "--bars", str(file)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "expected files that pytest --benchmark-json wrote" in done.stderr
    assert "Traceback" not in done.stderr

"""build_tools/sanitize.py without the build: what is copied, with which flags, what is run, what fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sanitize

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="for GCC on Linux")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout of two files, one of them ignored."""
    root = tmp_path / "tree"
    (root / "csrc").mkdir(parents=True)
    (root / "csrc/a.cpp").write_text("int a;\n")
    (root / "built.so").write_text("binary\n")
    (root / ".gitignore").write_text("*.so\n")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    monkeypatch.setattr(sanitize, "ROOT", root)
    return root


def test_the_copy_has_the_sources_and_keeps_the_age_of_what_has_not_changed(
    tree: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    sanitize.copy_tree(folder)
    assert (folder / "csrc/a.cpp").read_text() == "int a;\n"
    assert not (folder / "built.so").exists()
    before = (folder / "csrc/a.cpp").stat().st_mtime_ns
    sanitize.copy_tree(folder)
    assert (folder / "csrc/a.cpp").stat().st_mtime_ns == before
    (tree / "csrc/a.cpp").write_text("int b;\n")
    sanitize.copy_tree(folder)
    assert (folder / "csrc/a.cpp").read_text() == "int b;\n"


@pytest.mark.parametrize("kinds", [["address"], ["undefined"], ["address", "undefined"]])
def test_the_flags_stand_last(kinds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "echo")
    compiler = sanitize.write_compiler(tmp_path, kinds)
    said = subprocess.run([str(compiler), "-O3", "a b"], capture_output=True, text=True, check=True).stdout
    assert said.startswith("-O3 a b -O1 ")
    for kind in sanitize.KINDS:
        assert (f"-fsanitize={kind}" in said) == (kind in kinds)


@pytest.mark.parametrize(
    ("status", "report", "expected"), [(0, "", 0), (1, "", 1), (0, "ERROR: AddressSanitizer\n", 1)]
)
def test_a_failure_or_a_report_is_a_failure(
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: int,
    report: str,
    expected: int,
) -> None:
    (tree / "setup.py").write_text("")
    body = f"import sys; open('reports/as.1', 'w').write({report!r}); sys.exit({status})"
    monkeypatch.setattr(sanitize, "programs", lambda *_: [("tests", [sys.executable, "-c", body], {})])
    monkeypatch.setattr(sanitize, "environment", lambda *_: {})
    assert sanitize.sanitize(tmp_path / "copy", ["address"], [], 0) == expected
    assert (report in capsys.readouterr().out) or not report


def test_what_is_run() -> None:
    names = [name for name, _, _ in sanitize.programs(sanitize.TESTS, 20_000)]
    assert names == ["tests", "tests of the pool", "fuzz"]
    assert [name for name, _, _ in sanitize.programs(["tests/ops/test_stats.py"], 0)] == ["tests"]

"""build_tools/matrix.py without the gigabytes: what is asked for, run and written."""

from __future__ import annotations

from pathlib import Path

import matrix
import pytest

PAGE = f"# Building\n\n{matrix.BEGIN}\n\n{matrix.HEAD}\n\n{matrix.END}\n\nThe end.\n"


def row(
    torch: str = "2.9.1", result: str = "7 passed", suite: str = "whole", passed: bool = True
) -> matrix.Row:
    return matrix.Row(torch, "3.11.7", suite, "2026-11-30", result, passed)


def test_what_pip_is_asked_for() -> None:
    pyproject = (matrix.ROOT / "pyproject.toml").read_text()
    assert matrix.requirement("floor", pyproject) == "torch==2.9.*"
    assert matrix.requirement("newest", pyproject) == "torch"
    assert matrix.requirement("2.11.0", pyproject) == "torch==2.11.0"
    with pytest.raises(ValueError, match=r"expected floor, newest or one such as 2\.11\.0, got 'latest'"):
        matrix.requirement("latest", pyproject)
    with pytest.raises(ValueError, match="expected a dependency"):
        matrix.requirement("floor", "")


def test_the_page_has_the_block() -> None:
    page = matrix.PAGE.read_text()
    assert matrix.with_rows(page, []) == page
    assert "2.9" in matrix.with_rows(page, [row()]).partition(matrix.BEGIN)[2].partition(matrix.END)[0]


def test_a_row_replaces_its_own_and_leaves_others() -> None:
    page = matrix.with_rows(PAGE, [row(), row("2.14.1+cpu"), row(suite="ops", result="3 passed")])
    page = matrix.with_rows(page, [row(result="FAILED: 1 failed / 6 passed")])
    lines = [line for line in page.splitlines() if line.startswith("| 2")]
    assert [line.split(" | ")[0] for line in lines] == ["| 2.14.1+cpu", "| 2.9.1", "| 2.9.1"]
    assert "7 passed" in lines[0]
    assert {line.split(" | ")[-1] for line in lines[1:]} == {"FAILED: 1 failed / 6 passed |", "3 passed |"}
    assert page.startswith("# Building")
    assert page.endswith("The end.\n")
    with pytest.raises(ValueError, match="expected one block"):
        matrix.with_rows("no block", [row()])


@pytest.mark.parametrize("failing", [None, "doctor", "pytest"])
def test_each_torch_has_an_environment_of_its_own(failing, monkeypatch, capsys) -> None:
    seen: list[str] = []
    folders: set[Path] = set()

    def run(command):
        words = [str(word) for word in command]
        if words[1:3] == ["-m", "venv"]:
            folders.add(Path(words[3]))
            assert Path(words[3]).is_dir()
        else:
            assert any(word.startswith(tuple(map(str, folders))) for word in words)
        seen.append(" ".join(Path(word).name if "/" in word else word for word in words))
        if failing and failing in seen[-1]:
            return 1, "collected\n=== 1 failed, 6 passed in 3.21s ===\n"
        if "platform" in seen[-1]:
            return 0, "2.9.1+cu128 3.11.7\n"
        return 0, "=== 7 passed, 2 skipped in 3.21s (0:00:03) ===\n"

    monkeypatch.setattr(matrix, "run", run)
    monkeypatch.setattr("sys.argv", ["matrix.py", "--smoke", "floor", "2.14.1"])
    assert matrix.main() == (1 if failing else 0)
    last = capsys.readouterr().out.splitlines()[-1]
    wanted = {
        None: "torch 2.9.1+cu128, Python 3.11.7: 7 passed, 2 skipped",
        "doctor": "torch torch==2.9.*, Python ?: tolaria doctor FAILED: 1 failed, 6 passed",
        "pytest": "torch 2.9.1+cu128, Python 3.11.7: FAILED: 1 failed, 6 passed",
    }
    assert last.startswith(wanted[failing])
    assert len(folders) == 2
    assert not any(folder.exists() for folder in folders)
    assert "pip install -q torch==2.9.*" in seen
    assert "pip install -q torch==2.14.1" in seen
    assert sum("pytest -q" in line for line in seen) == (0 if failing == "doctor" else 2)


def test_nothing_of_ours_reaches_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/tree")
    monkeypatch.setenv("TOLARIA_BACKEND", "reference")
    found = matrix.environment()
    assert found["TOLARIA_CUDA"] == "0"
    assert not set(matrix.NOT_OURS) & found.keys()


def test_a_command_is_run_where_the_sources_are(capfd) -> None:
    status, said = matrix.run(["bash", "-c", "ls pyproject.toml; echo told >&2; exit 3"])
    assert (status, said) == (3, "pyproject.toml\ntold\n")
    assert "told" in capfd.readouterr().out

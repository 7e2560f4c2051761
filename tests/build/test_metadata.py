"""What setup.py adds to pyproject.toml, and what distributions hold."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import backend
import metadata
import pytest

import tolaria
from tolaria._version import VERSION
from tolaria.errors import BuildError

ROOT = Path(__file__).resolve().parents[2]


def test_version_stands_in_one_place():
    assert tolaria.__version__ == VERSION == metadata.version()
    assert "version" in backend.project()["dynamic"]


def test_local_version_names_the_torch():
    assert metadata.version("torch2.13.cpu") == f"{VERSION}+torch2.13.cpu"
    with pytest.raises(BuildError, match="TOLARIA_LOCAL_VERSION: expected letters, digits and dots"):
        metadata.version("torch 2.13/cpu")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("![A run](docs/run.png)", "![A run](https://host/t/raw/main/docs/run.png)"),
        ("[Page](docs/page.md#part) and", "[Page](https://host/t/blob/main/docs/page.md#part) and"),
        ("[Torch](https://pytorch.org)", "[Torch](https://pytorch.org)"),
        ("[above](#two-commands)", "[above](#two-commands)"),
    ],
)
def test_links_of_the_readme_lead_to_the_host(text, expected):
    assert metadata.absolute_links(text, "https://host/t") == expected


def test_readme_of_an_index_has_no_relative_link():
    described = metadata.dynamic(ROOT)["long_description"]
    assert "![A run on digits" in described
    assert "](docs/" not in described


def run_backend(hook: str, out: Path, tree: Path, **environment: str) -> Path:
    """Call the backend in a tree as a front end does; the file it made."""
    code = (
        f"import sys; sys.path.insert(0, 'build_tools'); import backend; print(backend.{hook}(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture
def tree(tmp_path):
    """What git has of the tree, so that nothing that was built is in it."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "tree" / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path / "tree"


def test_source_distribution_makes_the_pure_wheel_with_all_sources(tmp_path, tree):
    """From checkout to sdist, from that to the wheel; neither step needs torch or a compiler."""
    sdist = run_backend("build_sdist", tmp_path, tree, CXX="no-such-compiler")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        tracked = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
        assert {name for name in tracked - names if not name.startswith(".")} == set()
        archive.extractall(tmp_path / "unpacked", filter="data")
    unpacked = next((tmp_path / "unpacked").iterdir())
    wheel = run_backend("build_wheel", tmp_path, unpacked, TOLARIA_BUILD="0", CXX="no-such-compiler")
    assert wheel.name == f"tolaria-{VERSION}-py3-none-any.whl"
    carried = {path.relative_to(tree).as_posix() for path in (tree / "csrc").rglob("*") if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        inside = {name.removeprefix("tolaria/") for name in archive.namelist()}
    assert carried - inside == set()
    assert not [name for name in inside if name.endswith(".so")]

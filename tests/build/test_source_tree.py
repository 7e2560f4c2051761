"""A source tree without an extension that is the current folder, beside an installed tolaria that has one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tolaria import _extension
from tolaria._build.sources import source_digest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, tolaria
    from tolaria import _extension
    out = tolaria.ops.blend(torch.zeros(3), torch.ones(3), torch.tensor(0.5))
print(json.dumps({
    "tree": str(_extension.FOLDER), "place": str(_extension.PLACE), "loaded": _extension.LOADED,
    "said": [str(w.message) for w in caught], "out": out.tolist(), "error": str(_extension.LOAD_ERROR),
}))
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the package's sources, without an extension."""
    root = tmp_path / "tree"
    without = shutil.ignore_patterns("_C.*", "_build_info.json", "__pycache__", "csrc")
    shutil.copytree(_extension.FOLDER, root / "tolaria", ignore=without)
    shutil.copytree(ROOT / "csrc", root / "csrc")
    shutil.copy(ROOT / "setup.py", root)
    return root


@pytest.fixture
def site(tmp_path):
    """What pip makes of it: the package with its extension, and a record of both."""
    if not _extension.LOADED:
        pytest.skip("needs the compiled extension")
    folder = tmp_path / "site"
    shutil.copytree(_extension.FOLDER, folder / "tolaria", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*_extension.PLACE.glob("_C.*"), _extension.PLACE / "_build_info.json"]:
        shutil.copy(path, folder / "tolaria")
    info = json.loads((folder / "tolaria" / "_build_info.json").read_text())
    info["sources"] = source_digest(ROOT / "csrc")
    (folder / "tolaria" / "_build_info.json").write_text(json.dumps(info))
    facts = folder / "tolaria-0.1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: tolaria\nVersion: 0.1.0\n")
    return folder


def run_in(folder, site):
    environment = {**os.environ, "PYTHONPATH": str(site), "TOLARIA_CACHE": str(folder / "no-cache")}
    environment.pop("TOLARIA_BACKEND", None)
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_tree_takes_the_installed_extension_of_the_same_sources(tree, site):
    found = run_in(tree, site)
    assert found["tree"] == str(tree / "tolaria")
    assert found["place"] == str(site / "tolaria")
    assert found["loaded"]
    assert found["said"] == []
    assert found["out"] == [0.5] * 3


def test_tree_with_other_sources_says_what_hides_what(tree, site):
    (tree / "csrc" / "ops.h").write_text("// changed\n")
    found = run_in(tree, site)
    assert not found["loaded"]
    assert found["out"] == [0.5] * 3
    assert found["error"] == (
        f"tolaria._C: the source tree {tree} has no extension and hides the tolaria installed in {site}, "
        "whose extension was built from other sources; run `python setup.py build_ext --inplace`, or start "
        "Python in another folder"
    )
    assert [found["error"] in sentence for sentence in found["said"]] == [True]


def test_elsewhere_the_installed_package_is_found_alone(tmp_path, site):
    found = run_in(tmp_path, site)
    assert found["tree"] == found["place"] == str(site / "tolaria")
    assert found["loaded"]


def test_digest_knows_names_and_contents(tmp_path):
    seen = set()
    for name, text in ("a.h", "x"), ("b.h", "x"), ("a.h", "y"), ("a/b.h", "x"):
        folder = tmp_path / str(len(seen))
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
        seen.add(source_digest(folder))
    assert len(seen) == 4

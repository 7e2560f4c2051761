from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import build_info
import pytest
import torch

from tolaria import _extension
from tolaria._build.info import BuildInfo, mismatch, read_build_info, write_build_info
from tolaria._build.systems import unsupported_system
from tolaria.errors import BuildMismatchError, ExtensionMissingError

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def info(**changes) -> BuildInfo:
    facts = {"extension": True, "reason": "a test", "python": PYTHON, "torch": "2.13.0+cpu", "cuda": None}
    return BuildInfo(**{**facts, **changes})


@pytest.mark.parametrize(
    ("built", "runs"),
    [
        (info(), ("2.13.0+cpu", None)),
        (info(), ("2.13.1+cpu", None)),
        (info(), ("2.13.0+cu130", "13.0")),
        (info(torch="2.14.1+cu130", cuda="13.0"), ("2.14.1+cu132", "13.2")),
    ],
    ids=["same", "patch-release", "cpu-build-under-cuda-torch", "cuda-minor"],
)
def test_build_that_fits_is_loaded(built, runs):
    assert mismatch(built, *runs, PYTHON) is None


@pytest.mark.parametrize(
    ("built", "runs", "sentence"),
    [
        (info(), ("2.14.1+cpu", None), "built for torch 2.13.0+cpu (CPU), found torch 2.14.1+cpu (CPU)"),
        (
            info(torch="2.14.1+cu130", cuda="13.0"),
            ("2.14.1+cpu", None),
            "built for torch 2.14.1+cu130 (CUDA 13.0), found torch 2.14.1+cpu (CPU)",
        ),
        (
            info(torch="2.14.1+cu126", cuda="12.6"),
            ("2.14.1+cu130", "13.0"),
            "built for torch 2.14.1+cu126 (CUDA 12.6), found torch 2.14.1+cu130 (CUDA 13.0)",
        ),
        (
            info(torch="2.15.0.dev20261101"),
            ("2.15.0.dev20261102", None),
            "built for torch 2.15.0.dev20261101 (CPU), found torch 2.15.0.dev20261102 (CPU)",
        ),
        (info(python="3.9"), ("2.13.0+cpu", None), f"built for Python 3.9, found {PYTHON}"),
    ],
    ids=["torch-minor", "cuda-gone", "cuda-major", "nightly", "python"],
)
def test_build_for_something_else_names_both(built, runs, sentence):
    assert mismatch(built, *runs, PYTHON) == sentence


def test_written_info_is_read_back(tmp_path):
    written = info(archs=("8.0", "9.0+PTX"), cuda="13.0", cxx_flags=("-O3",))
    write_build_info(tmp_path, written)
    assert read_build_info(tmp_path) == written


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"extension": true}'], ids=["empty", "cut", "list", "incomplete"]
)
def test_damaged_info_counts_as_none(tmp_path, text):
    (tmp_path / "_build_info.json").write_text(text)
    assert read_build_info(tmp_path) is None


def test_extension_without_info_is_not_opened(tmp_path):
    error = _extension._check(tmp_path, None, present=True)
    assert isinstance(error, BuildMismatchError)
    assert "expected build info beside the extension, found none; run `tolaria build`" in str(error)


def test_missing_extension_says_how_it_came_to_be(tmp_path):
    chosen = _extension._check(tmp_path, info(extension=False), present=False)
    unbuilt = _extension._check(tmp_path, None, present=False)
    assert isinstance(chosen, ExtensionMissingError)
    assert "TOLARIA_BUILD=0" in str(chosen)
    assert isinstance(unbuilt, ExtensionMissingError)
    assert "it was not built" in str(unbuilt)


def test_extension_for_another_python_is_named(tmp_path):
    error = _extension._check(tmp_path, info(python="3.9"), present=False)
    assert isinstance(error, BuildMismatchError)
    assert f"built for Python 3.9, found {PYTHON}" in str(error)


def test_stale_extension_is_one_sentence_with_the_remedy(tmp_path):
    error = _extension._check(tmp_path, info(torch="1.0.0"), present=True)
    assert isinstance(error, BuildMismatchError)
    assert str(error).startswith("tolaria._C: built for torch 1.0.0 (CPU), found torch " + torch.__version__)
    assert str(error).endswith("; run `tolaria build`")
    assert "\n" not in str(error)


@pytest.mark.parametrize(("platform", "name"), [("darwin", "macOS"), ("win32", "Windows")])
def test_elsewhere_than_on_linux_there_is_no_extension_to_build(tmp_path, monkeypatch, platform, name):
    monkeypatch.setattr(_extension, "unsupported_system", lambda: unsupported_system(platform))
    sentence = str(_extension._check(tmp_path, info(extension=False), present=False))
    assert f"expected Linux, got {name}, where every op runs in pure PyTorch" in sentence
    assert "tolaria build" not in sentence


def test_in_a_checkout_the_remedy_is_a_build_in_place(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").touch()
    assert _extension.rebuild_command(tmp_path / "tolaria") == "`python setup.py build_ext --inplace`"


def test_git_revision_of_a_folder_without_git_is_none(tmp_path):
    assert build_info.git_revision(tmp_path) is None


def test_git_revision_marks_changes(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    (tmp_path / "file").write_text("one")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    clean = build_info.git_revision(tmp_path)
    (tmp_path / "file").write_text("two")
    assert clean is not None
    assert len(clean) == 40
    assert build_info.git_revision(tmp_path) == clean + "+"


def test_the_build_that_runs_describes_itself():
    if _extension.LOADED:
        assert _extension.INFO is not None
        assert mismatch(_extension.INFO, torch.__version__, torch.version.cuda, PYTHON) is None
        assert (_extension.INFO.cuda is not None) == _extension.CUDA
    else:
        assert str(_extension.LOAD_ERROR)


def test_extension_of_older_sources_is_one_sentence_with_the_remedy():
    if not _extension.LOADED:
        pytest.skip("there is no extension")
    assert _extension._older(_extension.OPS, _extension.CALLS) is None
    for ops, calls in (["op_of_tomorrow"], []), ([], ["op_of_tomorrow"]):
        sentence = str(_extension._older([*_extension.OPS, *ops], calls))
        assert "older sources, without op_of_tomorrow; run " in sentence


def test_every_registered_op_is_expected():
    source = Path(__file__).resolve().parents[2] / "csrc" / "registration.cpp"
    registered = set(re.findall(r'm\.def\(\s*"(\w+)', source.read_text()))
    assert sorted((*_extension.OPS, *_extension.CUDA_OPS)) == sorted(registered)

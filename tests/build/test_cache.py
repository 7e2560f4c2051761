"""Where cached builds are looked for, and which extension is taken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tolaria import _extension
from tolaria._build import cache
from tolaria._build.info import FILE_NAME, BuildInfo
from tolaria._build.sources import csrc, source_digest, units

SCRIPT = """
import json, torch, tolaria
from tolaria import _extension
out = tolaria.ops.blend(torch.zeros(3), torch.ones(3), torch.tensor(0.5))
error = str(_extension.LOAD_ERROR)
found = {"place": str(_extension.PLACE), "loaded": _extension.LOADED, "out": out.tolist(), "error": error}
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"TOLARIA_CACHE": "/named", "XDG_CACHE_HOME": "/xdg", "HOME": "/home/me"}, "/named"),
        ({"TOLARIA_CACHE": "~/named", "HOME": "/home/me"}, "/home/me/named"),
        ({"XDG_CACHE_HOME": "/xdg", "HOME": "/home/me"}, "/xdg/tolaria"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/me"}, "/home/me/.cache/tolaria"),
        ({"HOME": "/home/me"}, "/home/me/.cache/tolaria"),
    ],
)
def test_folder_of_the_cache(monkeypatch, environment, folder):
    for name in ("TOLARIA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache.cache_folder() == Path(folder)


def test_key_names_all_that_a_binary_depends_on():
    keys = {
        cache.build_key(*facts)
        for facts in [
            ("2.13.0+cpu", None, "a" * 64),
            ("2.13.1+cpu", None, "a" * 64),
            ("2.13.0", "13.0", "a" * 64),
            ("2.13.0", "12.6", "a" * 64),
            ("2.13.0+cpu", None, "b" * 64),
        ]
    }
    assert len(keys) == 5
    assert all(f"-{cache.sysconfig.get_config_var('SOABI')}-" in key for key in keys)


def test_newest_build_has_the_highest_number(monkeypatch, tmp_path):
    monkeypatch.setenv("TOLARIA_CACHE", str(tmp_path))
    (tmp_path / "csrc").mkdir()
    place = tmp_path / "builds" / cache.build_key("2.13.0", None, source_digest(tmp_path / "csrc"))
    assert cache.newest_build("2.13.0", None, tmp_path / "csrc") is None
    for name in ("2", "10", "9", ".building-x"):
        (place / name).mkdir(parents=True)
    assert cache.newest_build("2.13.0", None, tmp_path / "csrc") == place / "10"
    assert cache.newest_build("2.13.1", None, tmp_path / "csrc") is None


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"git": "else", "compiler": "else", "reason": "else", "toolkit": "else"}, True),
        ({"archs": ("8.0",)}, False),
        ({"cuda": "13.0"}, False),
        ({"cxx_flags": ("-O2",)}, False),
        ({"sources": "else"}, False),
    ],
)
def test_a_build_is_the_same_if_it_gives_the_same_extension(change, same):
    info = BuildInfo(extension=True, reason="why", python="3.11", torch="2.13.0", sources="digest")
    assert info.is_same_build(replace(info, **change)) is same
    assert not info.is_same_build(None)


def test_units_of_a_cpu_build_are_without_cuda():
    folder = csrc(_extension.FOLDER)
    every, without = units(folder, with_cuda=True), units(folder, with_cuda=False)
    assert {path.parent.name for path in set(every) - set(without)} == {"cuda"}
    assert folder / "python.cpp" in without


@pytest.fixture
def site(tmp_path):
    """An installed package, its sources in it, and the extension that runs here set aside."""
    if not _extension.LOADED:
        pytest.skip("needs the compiled extension")
    without = shutil.ignore_patterns("_C.*", FILE_NAME, "__pycache__", "csrc")
    package = tmp_path / "site" / "tolaria"
    shutil.copytree(_extension.FOLDER, package, ignore=without)
    shutil.copytree(csrc(_extension.FOLDER), package / "csrc")
    return tmp_path


def put(site: Path, folder: Path, **facts: object) -> Path:
    """The extension that runs here, in another folder, with another record."""
    folder.mkdir(parents=True, exist_ok=True)
    info = json.loads((_extension.PLACE / FILE_NAME).read_text())
    info |= {"sources": source_digest(site / "site" / "tolaria" / "csrc"), **facts}
    for path in _extension.PLACE.glob("_C.*"):
        shutil.copy(path, folder)
    (folder / FILE_NAME).write_text(json.dumps(info))
    return folder


def cached(site: Path, **facts: object) -> Path:
    digest = source_digest(site / "site" / "tolaria" / "csrc")
    key = cache.build_key(torch.__version__, torch.version.cuda, digest)
    return put(site, site / "cache" / "builds" / key / "1", **facts)


def found(site: Path) -> dict[str, object]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(site / "site"),
        "TOLARIA_CACHE": str(site / "cache"),
    }
    environment.pop("TOLARIA_BACKEND", None)
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    done = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert said["out"] == [0.5] * 3
    return said


def test_without_any_build_the_remedy_is_the_command(site):
    said = found(site)
    assert not said["loaded"]
    assert said["error"].endswith("to get it, run `tolaria build`")


def test_cached_build_is_taken_where_the_package_has_none(site):
    folder = cached(site)
    said = found(site)
    assert (said["loaded"], said["place"]) == (True, str(folder))


def test_cached_build_is_taken_where_the_package_has_one_for_another_torch(site):
    folder = cached(site)
    put(site, site / "site" / "tolaria", torch="1.0.0")
    later = (folder / FILE_NAME).stat().st_mtime + 10
    os.utime(site / "site" / "tolaria" / FILE_NAME, (later, later))
    said = found(site)
    assert (said["loaded"], said["place"]) == (True, str(folder))


def test_cached_build_is_taken_where_the_one_of_the_package_cannot_be_loaded(site):
    folder = cached(site)
    package = put(site, site / "site" / "tolaria")
    for path in package.glob("_C.*"):
        path.write_bytes(b"not a library")
    said = found(site)
    assert (said["loaded"], said["place"]) == (True, str(folder))


def test_of_two_that_fit_the_later_is_taken(site):
    folder, package = cached(site), put(site, site / "site" / "tolaria")
    now = (folder / FILE_NAME).stat().st_mtime
    for age, place in ((10, folder), (-10, package)):
        os.utime(package / FILE_NAME, (now - age, now - age))
        assert found(site)["place"] == str(place)


def test_cached_build_of_other_sources_is_left_alone(site):
    cached(site)
    (site / "site" / "tolaria" / "csrc" / "ops.h").write_text("// changed\n")
    assert not found(site)["loaded"]


def test_cached_build_that_cannot_be_loaded_is_built_anew_by_force(site):
    for path in cached(site).glob("_C.*"):
        path.write_bytes(b"not a library")
    said = found(site)
    assert not said["loaded"]
    assert said["error"].endswith("; run `tolaria build --force`")

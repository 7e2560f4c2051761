"""``tolaria build`` as an installed package runs it, on sources that take a second to compile."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tolaria import _extension
from tolaria._build import into_cache

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the extension is for Linux")

SOURCE = """
#include <Python.h>
DECLARATION
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, CALL};
  return PyModule_Create(&module);
}
"""
DEADLINE = 120


def hear_ctrl_c() -> None:
    """What is started in the background inherits that it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Site:
    """An installed package with small sources, a cache of its own, and a folder to be in."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache, self.cwd = root, root / "cache", root / "elsewhere"
        without = shutil.ignore_patterns("_C.*", "_build_info.json", "__pycache__", "csrc")
        shutil.copytree(_extension.FOLDER, root / "site" / "tolaria", ignore=without)
        self.cwd.mkdir()
        (self.cwd / "pyproject.toml").write_text("[tool.setuptools]\nno-such-setting = 1\n")  # of no concern
        self.csrc = root / "site" / "tolaria" / "csrc"
        self.csrc.mkdir()
        self.write()

    def write(self, declaration: str = "", call: str = "-1") -> None:
        text = SOURCE.replace("DECLARATION", declaration).replace("CALL", call)
        (self.csrc / "python.cpp").write_text(text)

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "ignore", "-m", "tolaria", "build", *words]
        settings = {
            **os.environ,
            "PYTHONPATH": str(self.root / "site"),
            "TOLARIA_CACHE": str(self.cache),
            "TOLARIA_CUDA": "0",
            **environment,
        }
        settings.pop("TOLARIA_BACKEND", None)
        return subprocess.Popen(
            command,
            cwd=self.cwd,
            env=settings,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=hear_ctrl_c,
        )

    def build(self, *words: str, **environment: str) -> tuple[int, str]:
        process = self.start(*words, **environment)
        output = process.communicate(timeout=DEADLINE)[0]
        return process.returncode, output

    def files(self) -> list[str]:
        """What is in the cache, the folder of the key left out."""
        found = (path.relative_to(self.cache / "builds") for path in (self.cache / "builds").rglob("*"))
        return sorted("/".join(path.parts[1:]) for path in found if len(path.parts) > 1)

    def unfinished(self) -> list[str]:
        return [path.name for path in (self.cache / "builds").glob(".*")]


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def slow_compiler(folder: Path) -> tuple[str, Path]:
    """A compiler that says when it begins with the sources, and does not come to an end."""
    path, marker = folder / "slow-c++", folder / "begun"
    begin = f"touch {marker}; sleep 600"
    path.write_text(f'#!/bin/sh\ncase "$*" in *csrc/python.cpp*) {begin} ;; esac\nexec c++ "$@"\n')
    path.chmod(0o755)
    return str(path), marker


def wait_for(path: Path) -> None:
    end = time.monotonic() + DEADLINE
    while not path.exists():
        assert time.monotonic() < end, f"no {path} in {DEADLINE} s"
        time.sleep(0.05)


def test_build_is_made_once_and_found_by_the_next(site):
    status, said = site.build()
    assert status == 0, said
    assert "tolaria build: building for the CPU: " in said
    extension = next((site.cache / "builds").glob("*/1/_C.*.so"))
    assert site.files() == ["1", f"1/{extension.name}", "1/_build_info.json"]
    assert site.unfinished() == []
    status, said = site.build()
    sentence = f"tolaria build: nothing to do, there is this very build in {extension.parent}\n"
    assert (status, said) == (0, sentence)
    status, said = site.build("--force", "--verbose")
    assert status == 0
    assert "-fvisibility=hidden" in said
    assert [name for name in site.files() if "/" not in name] == ["1", "2"]


def test_new_build_leaves_its_predecessor_alone(tmp_path):
    place = tmp_path / "key"
    for number in (1, 2, 3):
        (tmp_path / "done").mkdir()
        assert into_cache._move_in(tmp_path / "done", place) == place / str(number)
    assert sorted(path.name for path in place.iterdir()) == ["2", "3"]


def test_of_two_at_once_the_second_finds_what_the_first_built(site):
    both = [site.start(), site.start()]
    said = [process.communicate(timeout=DEADLINE)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("built in" in text for text in said) == [False, True]
    assert [name for name in site.files() if "/" not in name] == ["1"]
    assert site.unfinished() == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_build_leaves_nothing(site, number, status):
    compiler, marker = slow_compiler(site.root)
    process = site.start(CXX=compiler)
    wait_for(marker)
    process.send_signal(number)
    said = process.communicate(timeout=DEADLINE)[0]
    assert process.returncode == status, said
    assert "Traceback" not in said
    assert list((site.cache / "builds").iterdir()) == []


def test_what_a_killed_build_left_is_removed_by_the_next(site):
    compiler, marker = slow_compiler(site.root)
    process = site.start(CXX=compiler, MAX_JOBS="1")
    wait_for(marker)
    process.kill()
    process.communicate(timeout=DEADLINE)
    assert len(site.unfinished()) == 1
    status, said = site.build()
    assert status == 0, said
    assert site.unfinished() == []
    assert [name for name in site.files() if "/" not in name] == ["1"]


def test_failed_compiler_is_heard_and_leaves_nothing(site):
    site.write("this is no declaration;")
    status, said = site.build()
    assert status == 1
    assert "python.cpp:3:1: error: " in said
    assert "tolaria build: expected the extension to compile, got exit status 1; " in said.splitlines()[-1]
    assert list((site.cache / "builds").iterdir()) == []


def test_extension_that_does_not_load_is_no_build(site):
    site.write('extern "C" int defined_nowhere();', "defined_nowhere()")
    status, said = site.build()
    assert status == 1
    assert "expected an extension that loads, got ImportError: " in said
    assert "undefined symbol: defined_nowhere" in said
    assert list((site.cache / "builds").iterdir()) == []


def test_cache_that_cannot_be_written_to_is_one_sentence(site):
    site.cache.write_text("a file")
    status, said = site.build()
    assert status == 1
    assert said.startswith(
        f"tolaria build: expected a cache folder that can be written to, got {site.cache} ("
    )
    assert said.endswith("; set TOLARIA_CACHE to another\n")


def test_missing_compiler_is_one_sentence(site):
    status, said = site.build(CXX="no-such-compiler")
    assert status == 1
    assert said.startswith(
        "tolaria build: expected a C++ compiler, found CXX=no-such-compiler, which is not on PATH"
    )
    assert said.count("\n") == 1


def test_missing_sources_are_one_sentence(site):
    shutil.rmtree(site.csrc)
    status, said = site.build()
    assert status == 1
    assert said.startswith("tolaria build: expected the sources of the extension in ")


def test_unknown_option_is_a_status_of_its_own(site):
    assert site.build("--fast")[0] == 2

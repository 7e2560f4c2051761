"""build_tools/wheels.py without the build: the name of a wheel, and what is missing."""

from __future__ import annotations

import shutil

import pytest
import wheels

from tolaria import _extension


@pytest.mark.parametrize(
    ("version", "cuda", "local"),
    [("2.13.0+cpu", None, "torch2.13.cpu"), ("2.11.0+cu130", "13.0", "torch2.11.cu130")],
)
def test_wheel_names_its_torch(version, cuda, local):
    assert wheels.local_version(version, cuda) == local


def test_missing_program_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(wheels.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(wheels.sys, "argv", ["wheels.py", "--out", str(tmp_path)])
    assert wheels.main() == 1
    assert capsys.readouterr().err.endswith("run `pip install auditwheel`\n")


def test_module_has_one_symbol_of_its_own():
    """What a process loads beside us must not find our functions by name."""
    nm = shutil.which("nm")
    if nm is None or not _extension.LOADED or not any(_extension.PLACE.glob("_C.*.so")):
        pytest.skip("needs nm and the compiled extension")
    library = next(_extension.PLACE.glob("_C.*.so"))
    command = [nm, "--dynamic", "--defined-only", "--demangle", str(library)]
    listed = wheels.subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = [line.split(maxsplit=2)[2] for line in listed.splitlines()]
    assert "PyInit__C" in symbols
    assert [name for name in symbols if "tolaria" in name] == []

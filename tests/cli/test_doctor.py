from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import tolaria
from tolaria import _extension
from tolaria.cli import doctor as doctor_module
from tolaria.cli.doctor import EXTRAS, doctor, render
from tolaria.cli.main import main
from tolaria.errors import BuildMismatchError, ExtensionMissingError


def test_report_names_what_runs():
    report = doctor()
    assert report.versions["torch"] == torch.__version__
    assert report.versions["tolaria"] == tolaria.__version__
    assert report.extension_loaded == _extension.LOADED
    assert report.ops["cpu"] == ("fused" if _extension.LOADED else "reference")
    assert report.devices[0].startswith("cpu: ")


@pytest.mark.skipif(not _extension.LOADED, reason="the extension asks for it")
def test_last_level_cache_is_what_a_core_sees():
    """glibc adds up a whole AMD package's."""
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    if not sizes:
        pytest.skip("the system does not tell")
    mebibytes = int(sizes[-1].read_text().strip().removesuffix("K")) / 1024
    assert f", {mebibytes:g} MiB of last-level cache" in doctor().devices[0]
    assert _extension.last_level_cache() == mebibytes * 2**20


@pytest.mark.skipif(not _extension.LOADED, reason="the extension asks for it")
@pytest.mark.parametrize(
    ("text", "above", "said"),
    [
        (None, None, "writes past it in passes of more than "),
        ("0", 0, "more than 0 MiB (TOLARIA_STREAM_ABOVE)"),
        ("5000", 5000, "(TOLARIA_STREAM_ABOVE)"),
        ("3m", 3 << 20, "more than 3 MiB (TOLARIA_STREAM_ABOVE)"),
        ("999999999999G", 2**63 - 1, "never writes past it"),
        ("inf", 2**63 - 1, "never writes past it (TOLARIA_STREAM_ABOVE)"),
    ],
)
def test_passes_write_past_the_caches_from_a_size_on(text, above, said):
    code = "from tolaria import _extension; from tolaria.cli.doctor import doctor;"
    code += "print(_extension.stream_above(), doctor().devices[0])"
    env = {k: v for k, v in os.environ.items() if k != "TOLARIA_STREAM_ABOVE"}
    env |= {} if text is None else {"TOLARIA_STREAM_ABOVE": text}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    found, line = result.stdout.strip().split(" ", 1)
    usual = min(_extension.last_level_cache(), 32 << 20) // 2
    assert int(found) == (usual if above is None else above)
    assert said in line


@pytest.mark.parametrize("text", ["", "many", "-1", "1.5M", "1T", "nan"])
def test_a_size_that_is_none_is_an_error(text):
    env = {**os.environ, "TOLARIA_STREAM_ABOVE": text}
    result = subprocess.run([sys.executable, "-c", "import tolaria"], env=env, capture_output=True, text=True)
    assert result.returncode == 1
    said = f"TOLARIA_STREAM_ABOVE: expected bytes, such as 16777216, 16M, 0 or inf, got {text!r}"
    assert said in result.stderr


def test_extras_are_those_of_the_project():
    """What an extra takes in of the others' counts, too."""
    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    tomllib = pytest.importorskip("tomllib")
    said = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["optional-dependencies"]

    def packages(extra):
        found = {}
        for requirement in said[extra]:
            name, _, least = requirement.partition(">=")
            if name.startswith("tolaria["):
                for other in name.removeprefix("tolaria[").rstrip("]").split(","):
                    found |= packages(other)
            else:
                found[name] = least
        return found

    assert {extra: packages(extra) for extra in said if extra not in ("trainers", "dev", "all")} == EXTRAS


def test_missing_and_old_packages_are_named(monkeypatch):
    installed = {"river": None, "torchmetrics": "1.0.0", "pytest": "8.1.9", "rich": "13.0rc1"}
    monkeypatch.setattr(doctor_module, "_version", lambda name: installed.get(name, "99.0+cpu"))
    extras = doctor().extras
    assert extras["bench"] == ("pytest (at least 8.2, got 8.1.9)", "river")
    assert extras["train"] == ()
    assert "bench: missing pytest (at least 8.2, got 8.1.9), river" in render(doctor())


def test_reference_mode_shows_in_the_report():
    with tolaria.backend("reference"):
        assert set(doctor().ops.values()) == {"reference"}


def test_stale_build_is_a_problem(monkeypatch, capsys):
    monkeypatch.setattr(_extension, "LOAD_ERROR", BuildMismatchError("built for A, found B; run C"))
    assert main(["doctor"]) == 1
    assert "PROBLEM: built for A, found B; run C" in capsys.readouterr().out


def test_pure_installation_is_healthy_and_says_so(monkeypatch):
    monkeypatch.setattr(_extension, "LOAD_ERROR", ExtensionMissingError("there is none; run C"))
    monkeypatch.setattr(_extension, "outdated_sentence", lambda folder: None)
    report = doctor()
    assert report.is_healthy
    assert "advice: every op runs in pure PyTorch: there is none; run C" in render(report)


def test_changed_sources_are_a_problem(monkeypatch, tmp_path):
    package = tmp_path / "tolaria"
    package.mkdir()
    (tmp_path / "csrc").mkdir()
    (package / "_C.so").touch()
    (tmp_path / "csrc" / "new.cpp").touch()
    monkeypatch.setattr(_extension, "FOLDER", package)
    monkeypatch.setattr(_extension, "LOAD_ERROR", None)
    later = (package / "_C.so").stat().st_mtime + 10
    os.utime(tmp_path / "csrc" / "new.cpp", (later, later))
    assert any("csrc has changed" in problem for problem in doctor().problems)
    monkeypatch.setattr(_extension, "importlib", Mock())
    monkeypatch.setattr(_extension, "_check", lambda *_: None)
    monkeypatch.setattr(_extension, "_older", lambda *_: None)
    with pytest.warns(RuntimeWarning, match="csrc has changed since the extension was built; run "):
        _extension._load()


def test_json_is_the_report(capsys):
    main(["doctor", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == {field.name for field in dataclasses.fields(doctor())}
    assert printed["versions"]["torch"] == torch.__version__


def test_module_runs_as_a_command(tmp_path):
    command = [sys.executable, "-m", "tolaria", "--version"]
    environment = {**os.environ, "PYTHONPATH": str(_extension.FOLDER.parent)}  # the package under test
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"tolaria {tolaria.__version__}"


def test_no_command_prints_help(capsys):
    assert main([]) == 0
    assert "doctor" in capsys.readouterr().out


def test_unknown_command_names_the_known(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["doktor"])
    assert caught.value.code == 2
    assert "doctor" in capsys.readouterr().err

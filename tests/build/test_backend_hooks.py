from __future__ import annotations

import os
import subprocess
import sys

import backend
import pytest


def distribution(folder, version):
    """The trace of an installed torch: enough for its version, and to be found."""
    facts = folder / f"torch-{version}.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").touch()
    return str(folder)


@pytest.fixture
def isolated(monkeypatch):
    """As in an isolated build: no torch on ``sys.path``, which is put back at the end."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: name)


def test_requirement_is_the_runtime_dependency():
    assert backend.torch_requirement().startswith("torch>=")


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("2.6.0", True),
        ("2.13.0+cpu", True),
        ("2.14.1", True),
        ("3.0.0a0+git", True),
        ("2.5.9", False),
        ("1.13", False),
    ],
)
def test_range_is_compared_by_numbers(version, supported):
    assert backend.is_supported(version, "torch>=2.6") is supported


@pytest.mark.usefixtures("isolated")
def test_torch_of_the_environment_is_exposed_behind_the_isolated_packages(tmp_path, monkeypatch):
    site = distribution(tmp_path / "site", "2.13.0+cpu")
    monkeypatch.setattr(backend, "environment_sites", lambda: [site])
    assert backend.expose_torch()
    assert sys.path[-1] == site


@pytest.mark.usefixtures("isolated")
def test_torch_out_of_range_is_left_alone(tmp_path, monkeypatch):
    site = distribution(tmp_path / "site", "1.13.1")
    monkeypatch.setattr(backend, "environment_sites", lambda: [site])
    assert not backend.expose_torch()
    assert site not in sys.path


@pytest.mark.usefixtures("isolated")
def test_torch_is_asked_for_only_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(backend.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(backend, "environment_sites", lambda: [str(tmp_path)])
    assert backend._requirements() == [backend.torch_requirement()]
    monkeypatch.setattr(backend, "environment_sites", lambda: [distribution(tmp_path / "site", "2.14.1")])
    assert backend._requirements() == []


@pytest.mark.usefixtures("isolated")
def test_ninja_is_asked_for_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    monkeypatch.setattr(backend, "environment_sites", lambda: [distribution(tmp_path / "site", "2.14.1")])
    assert backend._requirements() == ["ninja"]


@pytest.mark.usefixtures("isolated")
def test_pure_build_asks_for_nothing(monkeypatch):
    monkeypatch.setenv("TOLARIA_BUILD", "0")
    assert backend._requirements() == []


def test_oldest_setuptools_is_that_of_pyproject():
    assert f'requires = ["setuptools>={backend.OLDEST_SETUPTOOLS}"' in backend.PYPROJECT.read_text()


@pytest.mark.parametrize(
    ("version", "fits"), [("65.5.0", False), ("76.1", False), ("77.0.3", True), ("84", True)]
)
def test_old_setuptools_is_one_sentence_with_the_remedy(version, fits):
    problem = backend.setuptools_problem(version)
    assert (problem is None) is fits
    if problem is not None:
        wanted = f'expected setuptools 77 or newer, got {version}; run `pip install "setuptools>=77"`'
        assert problem == wanted


def test_setup_checks_setuptools_first(tmp_path):
    """Without isolation it is the first of ours to run; setuptools 65 cannot read pyproject.toml."""
    (tmp_path / "setuptools").mkdir()
    (tmp_path / "setuptools" / "__init__.py").write_text("__version__ = '65.5.0'\nExtension = setup = None\n")
    for path in ("build_meta.py", "command/__init__.py", "command/build_ext.py", "command/build_py.py"):
        (tmp_path / "setuptools" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "setuptools" / path).write_text(
            "build_ext = build_py = build_sdist = get_requires_for_build_sdist = None\n"
            "prepare_metadata_for_build_wheel = prepare_metadata_for_build_editable = None\n"
        )
    command = [sys.executable, str(backend.PYPROJECT.parent / "setup.py"), "--version"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("tolaria: expected setuptools 77 or newer, got 65.5.0; run `pip install")

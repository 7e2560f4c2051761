"""The PEP 517 backend: setuptools, building against the torch that is already installed.

Front ends build in an isolated environment, where the installed torch is out of sight and another one would
be fetched: a different build, a different ABI, gigabytes. This wrapper lets the isolated interpreter see the
packages of the environment that it installs into (after its own, so the isolated setuptools still wins). Only
where that environment holds no torch in the supported range does it ask for one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import setuptools
from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
OLDEST_SETUPTOOLS = 77
"""As pyproject.toml has it; looked at before anything that an older one does not bring along."""
Settings = Mapping[str, "str | list[str] | None"]

prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable


def setuptools_problem(version: str = setuptools.__version__) -> str | None:
    """What stands against this setuptools, and the remedy; an isolated build gets one that fits."""
    if int(version.split(".")[0]) >= OLDEST_SETUPTOOLS:
        return None
    remedy = f'run `pip install "setuptools>={OLDEST_SETUPTOOLS}"`'
    return f"expected setuptools {OLDEST_SETUPTOOLS} or newer, got {version}; {remedy}"


def project() -> dict[str, Any]:
    """The table ``project`` of pyproject.toml."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # setuptools brings it along
    table: dict[str, Any] = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    return table


def torch_requirement() -> str:
    """The runtime dependency on torch, as pyproject.toml states it (``torch>=2.9``)."""
    return next(line for line in project()["dependencies"] if line.startswith("torch"))


def is_supported(version: str, requirement: str) -> bool:
    """Whether a torch version satisfies ``torch>=X.Y``; local parts and pre-releases do not matter here."""
    from packaging.requirements import Requirement  # setuptools brings it along
    from packaging.version import Version

    return Version(version).base_version in Requirement(requirement).specifier


def environment_sites() -> list[str]:
    """Where the interpreter's environment keeps its packages, whatever isolation did to ``sys.path``."""
    sites = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:
        sites.append(site.getusersitepackages())
    return list(dict.fromkeys(sites))


def torch_version(path: Iterable[str] | None = None) -> str | None:
    """The version of the torch found on ``path`` (default: ``sys.path``), or None; does not import it."""
    found = importlib.metadata.distributions(name="torch", **({} if path is None else {"path": list(path)}))
    return next((distribution.version for distribution in found), None)


def expose_torch() -> bool:
    """Make a supported torch importable; False if there is none here or in the target environment."""
    requirement = torch_requirement()
    visible = torch_version()
    if visible is not None:
        return is_supported(visible, requirement)
    sites = environment_sites()
    version = torch_version(sites)
    if version is None or not is_supported(version, requirement):
        return False
    sys.path.extend(folder for folder in sites if folder not in sys.path)
    importlib.invalidate_caches()
    return importlib.util.find_spec("torch") is not None


def _requirements() -> list[str]:
    """What a build needs beyond setuptools: ninja unless there is one, torch unless there is one."""
    if os.environ.get("TOLARIA_BUILD") == "0":
        return []
    requirements = [] if shutil.which("ninja") else ["ninja"]
    if not expose_torch():
        requirements.append(torch_requirement())
    return requirements


def get_requires_for_build_wheel(config_settings: Settings | None = None) -> list[str]:
    """PEP 517: requirements of :func:`build_wheel`."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _requirements()


def get_requires_for_build_editable(config_settings: Settings | None = None) -> list[str]:
    """PEP 660: requirements of :func:`build_editable`."""
    return build_meta.get_requires_for_build_editable(config_settings) + _requirements()


def build_wheel(
    wheel_directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    """PEP 517: build the wheel against the torch that :func:`expose_torch` finds."""
    expose_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    """PEP 660: build in place against the torch that :func:`expose_torch` finds."""
    expose_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)

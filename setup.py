"""Build ``tolaria._C``; how is written in tolaria/_build, what only an installation needs in build_tools/."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))

import backend  # noqa: E402

if problem := backend.setuptools_problem():
    sys.exit(f"tolaria: {problem}")

import bare_package  # noqa: E402, F401
import build_info  # noqa: E402
import metadata  # noqa: E402

from tolaria._build import plan, sources  # noqa: E402
from tolaria._build.info import BuildInfo, python_version  # noqa: E402
from tolaria.errors import BuildError  # noqa: E402

CSRC = ROOT / "csrc"
BUILD_COMMANDS = {"bdist", "bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


def pure_options() -> dict[str, object]:
    """No extension: the reference implementation, and the sources for ``tolaria build``."""
    info = BuildInfo(
        extension=False,
        reason="TOLARIA_BUILD=0",
        python=python_version(),
        git=build_info.git_revision(ROOT),
        sources=sources.source_digest(CSRC),
    )
    return {"cmdclass": {"build_py": build_info.carrying_build_py(CSRC, info)}}


def extension_options() -> dict[str, object]:
    """The extension, for CPU or CUDA, built by torch's own commands."""
    chosen = plan.make_plan()
    print(f"tolaria: building {chosen.describe()}", flush=True)
    from torch.utils.cpp_extension import BuildExtension

    info = chosen.build_info(CSRC, build_info.git_revision(ROOT))
    return {
        "ext_modules": [chosen.extension(CSRC, ROOT)],
        "cmdclass": {
            "build_ext": build_info.recording_build_ext(BuildExtension, info),
            "build_py": build_info.carrying_build_py(CSRC, None),
        },
    }


def options() -> dict[str, object]:
    """What setup() needs beyond pyproject.toml; metadata and sdist need neither torch nor a compiler."""
    if plan.switch("TOLARIA_BUILD") is False:
        return pure_options()
    if BUILD_COMMANDS.isdisjoint(sys.argv):
        units = [path.relative_to(ROOT).as_posix() for path in sources.units(CSRC, with_cuda=False)]
        return {"ext_modules": [Extension(plan.EXTENSION, units)]}
    return extension_options()


try:
    chosen = {**metadata.dynamic(ROOT), **options()}
except BuildError as error:
    sys.exit(f"tolaria: {error}")
setup(**chosen)

"""setuptools commands that leave a record of the build, and the sources, in the package they build."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

from tolaria._build.info import BuildInfo, write_build_info
from tolaria._build.plan import EXTENSION


def git_revision(root: Path) -> str | None:
    """The commit that is built, with ``+`` if the tree has changes; None outside a git checkout."""

    def git(*words: str) -> str | None:
        try:
            command = ["git", "-C", str(root), *words]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top, commit = git("rev-parse", "--show-toplevel"), git("rev-parse", "HEAD")
    if commit is None or top is None or Path(top).resolve() != root.resolve():
        return None
    return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def recording_build_ext(base: type[build_ext], info: BuildInfo) -> type[build_ext]:
    """``base``, which also writes ``info`` beside the extension once that is linked."""

    class RecordingBuildExt(base):  # type: ignore[valid-type, misc]
        def run(self) -> None:
            super().run()
            write_build_info(Path(self.get_ext_fullpath(EXTENSION)).parent, info)

    return RecordingBuildExt


def carrying_build_py(csrc: Path, info: BuildInfo | None) -> type[build_py]:
    """A ``build_py`` that puts the sources into the package, so that ``tolaria build`` needs no checkout.

    Args:
        csrc: the folder with the sources.
        info: the record of a build without an extension, which no ``build_ext`` writes.
    """

    class CarryingBuildPy(build_py):
        def run(self) -> None:
            super().run()
            if self.editable_mode:
                return
            package = Path(self.build_lib, "tolaria")
            shutil.rmtree(package / "csrc", ignore_errors=True)  # of a former build
            shutil.copytree(csrc, package / "csrc")
            if info is not None:
                write_build_info(package, info)

    return CarryingBuildPy

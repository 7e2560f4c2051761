"""What a build was made of and for: collected, written beside the extension, compared before that is loaded.

The reader is ``tolaria/_extension.py``; the keys are those of its ``BuildInfo``.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

FILE_NAME = "_build_info.json"
EXTENSION = "tolaria._C"

Info = dict[str, "str | bool | list[str] | None"]


def python_version() -> str:
    """The Python whose ABI the extension has, such as ``3.11``."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


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


def source_digest(root: Path) -> str:
    """The digest of ``csrc``, as the package computes it."""
    run = runpy.run_path(str(root / "tolaria" / "_sources.py"))
    return str(run["source_digest"](root / "csrc"))


def write(folder: Path, info: Info) -> None:
    """Write ``info`` into the package folder."""
    (folder / FILE_NAME).write_text(json.dumps(info, indent=2, sort_keys=True) + "\n")


def recording_build_ext(base: type[build_ext], info: Info) -> type[build_ext]:
    """``base``, which also writes ``info`` beside the extension once that is linked."""

    class RecordingBuildExt(base):  # type: ignore[valid-type, misc]
        def run(self) -> None:
            super().run()
            write(Path(self.get_ext_fullpath(EXTENSION)).parent, info)

    return RecordingBuildExt


def recording_build_py(info: Info) -> type[build_py]:
    """The plain ``build_py``, which also writes ``info``: for a wheel without an extension."""

    class RecordingBuildPy(build_py):
        def run(self) -> None:
            super().run()
            if not self.editable_mode:
                write(Path(self.build_lib, "tolaria"), info)

    return RecordingBuildPy

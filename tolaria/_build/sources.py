"""Where the extension's sources are, which of them are compiled, and a digest by which a build knows its own."""

from __future__ import annotations

import hashlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the package."""


def csrc(package: Path = PACKAGE) -> Path:
    """The sources of the extension: an installed package carries them, a source tree has them beside it."""
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def units(folder: Path, with_cuda: bool) -> list[Path]:
    """Every translation unit below ``folder``; those in ``cuda`` belong to a CUDA build alone."""
    found = (path for kind in ("*.cpp", "*.cu") for path in folder.rglob(kind))
    return sorted(path for path in found if with_cuda or path.relative_to(folder).parts[0] != "cuda")


def source_digest(folder: Path) -> str:
    """Of the names and contents of all files: by it a source tree or a cache knows a build of its own."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()

"""What a build was made of and for: written beside the extension, compared before that is loaded."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

FILE_NAME = "_build_info.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildInfo:
    """What a build was made of and for."""

    extension: bool
    """False for an installation without the extension (``TOLARIA_BUILD=0``)."""
    reason: str
    """Why it is a CPU or a CUDA build."""
    python: str
    """The Python version, such as ``3.11``."""
    git: str | None = None
    """The commit, with ``+`` if the tree had changes."""
    torch: str | None = None
    """``torch.__version__``."""
    cuda: str | None = None
    """``torch.version.cuda`` if the extension holds CUDA kernels, else None."""
    toolkit: str | None = None
    """The version of the CUDA toolkit that compiled the kernels."""
    archs: tuple[str, ...] = ()
    """The architectures, as in ``TORCH_CUDA_ARCH_LIST``."""
    compiler: str | None = None
    """The C++ compiler."""
    cxx_flags: tuple[str, ...] = ()
    """Our flags for the C++ compiler."""
    nvcc_flags: tuple[str, ...] = ()
    """Our flags for nvcc."""
    sources: str | None = None
    """The digest of ``csrc``; see :func:`tolaria._build.sources.source_digest`."""

    def is_same_build(self, other: BuildInfo | None) -> bool:
        """Whether a build of ``other`` would give this extension: all but who compiled it, and why."""
        decisive = ("extension", "python", "torch", "cuda", "archs", "cxx_flags", "nvcc_flags", "sources")
        return other is not None and all(getattr(self, name) == getattr(other, name) for name in decisive)


def python_version() -> str:
    """The Python whose ABI an extension has, such as ``3.11``."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def write_build_info(folder: Path, info: BuildInfo) -> None:
    """Write ``info`` into a package folder."""
    (folder / FILE_NAME).write_text(json.dumps(asdict(info), indent=2, sort_keys=True) + "\n", "utf-8")


def read_build_info(folder: Path) -> BuildInfo | None:
    """The build info in a package folder, or None if there is none or it is not ours."""
    try:
        record: dict[str, Any] = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        known = {field.name for field in fields(BuildInfo)} & record.keys()
        lists = {name: tuple(record[name]) for name in known if isinstance(record[name], list)}
        return BuildInfo(**{name: record[name] for name in known} | lists)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _abi(version: str) -> str:
    """What has to agree between the torch built for and the one that runs: X.Y, all of it for a nightly."""
    try:
        known = Version(version)
    except InvalidVersion:
        return version
    is_snapshot = known.is_devrelease or (known.pre or ("",))[0] == "a" or "git" in (known.local or "")
    return version if is_snapshot else f"{known.major}.{known.minor}"


def mismatch(info: BuildInfo, torch_version: str, torch_cuda: str | None, python: str) -> str | None:
    """How a build differs from what runs, if that matters to the ABI.

    Args:
        info: what the extension was built for.
        torch_version: ``torch.__version__`` of the torch that runs.
        torch_cuda: its ``torch.version.cuda``.
        python: the version of the Python that runs, such as ``3.11``.

    Returns:
        ``built for X, found Y``, or None if the extension fits.
    """
    if info.python != python:
        return f"built for Python {info.python}, found {python}"
    needs_cuda = info.cuda.split(".")[0] if info.cuda else None
    has_cuda = torch_cuda.split(".")[0] if torch_cuda else None
    if info.torch and _abi(info.torch) == _abi(torch_version) and needs_cuda in {None, has_cuda}:
        return None
    built = f"torch {info.torch or 'unknown'} ({f'CUDA {info.cuda}' if info.cuda else 'CPU'})"
    return f"built for {built}, found torch {torch_version} ({f'CUDA {torch_cuda}' if torch_cuda else 'CPU'})"


def has_kernels_for(archs: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether kernels built for ``archs`` run on a device of this compute capability.

    Machine code runs on its own major version from its own minor one on, PTX on anything newer; ``9.0a`` is
    for 9.0 alone, ``10.0f`` for its major version.

    Args:
        archs: as :attr:`BuildInfo.archs`. One that is no number is taken to fit.
        capability: what ``torch.cuda.get_device_capability`` says.
    """
    for arch in archs:
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch.strip())
        if found is None:
            return True
        built = (int(found[1]), int(found[2]))
        reaches = found[4] and not found[3]
        if capability == built or (
            found[3] != "a" and capability > built and (reaches or capability[0] == built[0])
        ):
            return True
    return False

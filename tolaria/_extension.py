"""The only importer of the compiled extension ``tolaria._C``: check its build info, load it, explain failure.

The build info is compared before the extension is opened, because a build for another torch fails with an
undefined symbol at best. Whatever goes wrong becomes one sentence in :data:`LOAD_ERROR`, which ends with the
remedy; nothing is raised here, so that the reference and ``tolaria doctor`` work without an extension. One
built in place that is older than its sources is loaded with a warning.

A source tree without an extension hides an installed tolaria where it is the current folder (``python -m``, a
prompt, a notebook). It then takes the installed extension, if that was built from the very same sources.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from tolaria._sources import source_digest
from tolaria.errors import BuildMismatchError, ExtensionMissingError, TolariaError

FOLDER = Path(__file__).resolve().parent
NAME = "tolaria._C"

OPS = (
    "blend",
    "blend_backward",
    "blend_backward_",
    "classification_metrics_",
    "governor_fields",
    "governor_order_",
    "governor_step_",
    "metrics_fields",
    "release_idle_outputs",
    "seed_gate",
    "seed_gate_backward",
    "seed_gate_backward_",
    "snapshot_capture_",
    "snapshot_restore_",
    "straight_through",
    "tensor_stats",
)
"""What an extension of these sources registers; one that lacks an op was built from older ones."""

CUDA_OPS = ("page_locked",)
"""What one with CUDA kernels registers beside them."""

CALLS = ("judge", "last_level_cache", "recording", "set_stream_above", "stream_above")
"""What its module itself offers, beside torch's dispatcher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildInfo:
    """What a build was made of and for; written by ``build_tools/build_info.py``."""

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
    """The digest of ``csrc``; see :func:`tolaria._sources.source_digest`."""


def read_build_info(folder: Path) -> BuildInfo | None:
    """The build info in a package folder, or None if there is none or it is not ours."""
    try:
        record: dict[str, Any] = json.loads((folder / "_build_info.json").read_text(encoding="utf-8"))
        known = {field.name for field in fields(BuildInfo)} & record.keys()
        lists = {name: tuple(record[name]) for name in known if isinstance(record[name], list)}
        return BuildInfo(**{name: record[name] for name in known} | lists)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def is_checkout(folder: Path) -> bool:
    """Whether a package folder is that of a source tree, where an extension can be built in place."""
    return (folder.parent / "setup.py").is_file() and (folder.parent / "csrc").is_dir()


def rebuild_command(folder: Path) -> str:
    """How to build the extension anew: in place in a checkout, else by a new installation."""
    if is_checkout(folder):
        return "`python setup.py build_ext --inplace`"
    return "`pip install --force-reinstall --no-deps --no-cache-dir .` in a checkout of tolaria"


def outdated_sentence(folder: Path) -> str | None:
    """In a checkout: that a file of csrc is newer than the extension built in place, if one is."""
    built = [path.stat().st_mtime for path in folder.glob("_C.*")]
    sources = [path.stat().st_mtime for path in (folder.parent / "csrc").rglob("*.*")]
    if not built or not sources or max(sources) <= max(built):
        return None
    return f"csrc has changed since the extension was built; run {rebuild_command(folder)}"


def _abi(version: str) -> str:
    """What has to agree between the torch built for and the one that runs: X.Y, all of it for a nightly."""
    release = re.match(r"\d+\.\d+", version)
    return version if release is None or re.search(r"dev|a\d|git", version) else release.group()


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


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _check(folder: Path, info: BuildInfo | None, present: bool) -> TolariaError | None:
    """What stands against loading the extension in ``folder``, before it is opened."""
    remedy = f"run {rebuild_command(folder)}"
    if not present:
        if info is not None and info.extension and info.python != _python():
            return BuildMismatchError(f"{NAME}: built for Python {info.python}, found {_python()}; {remedy}")
        why = "installed without it by TOLARIA_BUILD=0" if info and not info.extension else "it was not built"
        return ExtensionMissingError(f"{NAME}: there is no compiled extension ({why}); to get it, {remedy}")
    if info is None or not info.extension:
        return BuildMismatchError(f"{NAME}: expected build info beside the extension, found none; {remedy}")
    difference = mismatch(info, torch.__version__, torch.version.cuda, _python())
    return BuildMismatchError(f"{NAME}: {difference}; {remedy}") if difference else None


def _installed() -> Path | None:
    """The folder of an installed tolaria with an extension, other than this package."""
    for distribution in importlib.metadata.distributions(name="tolaria"):
        folder = Path(str(distribution.locate_file("tolaria"))).resolve()
        if folder != FOLDER and any(folder.glob("_C.*")):
            return folder
    return None


def _choose() -> tuple[Path, TolariaError | None]:
    """The folder to take the extension from, or what stands against taking the installed one."""
    here = importlib.machinery.PathFinder.find_spec(NAME, [str(FOLDER)])
    installed = _installed() if here is None and is_checkout(FOLDER) else None
    if installed is None:
        return FOLDER, None
    info = read_build_info(installed)
    if info is not None and info.sources == source_digest(FOLDER.parent / "csrc"):
        return installed, None
    return FOLDER, ExtensionMissingError(
        f"{NAME}: the source tree {FOLDER.parent} has no extension and hides the tolaria installed in "
        f"{installed.parent}, whose extension was built from other sources; run {rebuild_command(FOLDER)}, "
        "or start Python in another folder"
    )


def _import(folder: Path) -> None:
    """Import the extension from a folder, which need not be that of the package."""
    if folder == FOLDER:
        importlib.import_module(NAME)
        return
    spec = importlib.machinery.PathFinder.find_spec(NAME, [str(folder)])
    if spec is None or spec.loader is None:
        raise ImportError(f"there is no extension in {folder}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module


def _load() -> tuple[BuildInfo | None, Path, TolariaError | None]:
    """Load the extension if it fits; the build info found, the folder it is from, and what went wrong."""
    folder, error = _choose()
    info = read_build_info(folder)
    present = importlib.machinery.PathFinder.find_spec(NAME, [str(folder)]) is not None
    error = error or _check(folder, info, present)
    if error is None:
        try:
            _import(folder)
        except ImportError as failure:
            reason = str(failure).strip().split("\n")[0]
            error = BuildMismatchError(f"{NAME}: cannot be loaded ({reason}); run {rebuild_command(folder)}")
        else:
            with_cuda = info is not None and info.cuda is not None
            error = _older((*OPS, *CUDA_OPS) if with_cuda else OPS, CALLS)
            outdated = outdated_sentence(FOLDER)
            if error is None and outdated is not None:
                warnings.warn(f"{NAME}: {outdated}", RuntimeWarning, stacklevel=1)
    return info, folder, error


def _older(ops: Iterable[str], calls: Iterable[str] = ()) -> TolariaError | None:
    """What stands against using the extension that was loaded: an op or a call that it does not have."""
    missing = [name for name in ops if not hasattr(torch.ops.tolaria, name)]
    missing += [name for name in calls if not hasattr(sys.modules[NAME], name)]
    if not missing:
        return None
    return BuildMismatchError(
        f"{NAME}: built from older sources, without {missing[0]}; run {rebuild_command(FOLDER)}"
    )


def _not_loaded(*_: object) -> NoReturn:
    raise ExtensionMissingError(f"{NAME}: it is not loaded. {LOAD_ERROR}")


INFO: BuildInfo | None
"""What the extension was built of and for; None without any record of a build."""
PLACE: Path
"""The folder with the extension: :data:`FOLDER`, or that of the installed tolaria, which this tree hides."""
LOAD_ERROR: TolariaError | None
"""Why the extension could not be loaded, with the remedy; None when it is loaded."""
INFO, PLACE, LOAD_ERROR = _load()

LOADED: bool = LOAD_ERROR is None
"""True when the extension is loaded and its ops are registered."""
CUDA: bool = LOADED and INFO is not None and INFO.cuda is not None
"""True when the loaded extension holds CUDA kernels."""

judge: Callable[..., bool] = sys.modules[NAME].judge if LOADED else _not_loaded
"""What :func:`tolaria.ops.governor.judge_` calls; see csrc/python.cpp."""
recording: Callable[[int], int] = sys.modules[NAME].recording if LOADED else _not_loaded
"""The number of the CUDA graph recording that a device's current stream takes part in; 0: none."""
last_level_cache: Callable[[], int] = sys.modules[NAME].last_level_cache if LOADED else _not_loaded
"""Bytes of the last cache before memory, as the system tells."""
stream_above: Callable[[], int] = sys.modules[NAME].stream_above if LOADED else _not_loaded
"""A CPU op that reads and writes more bytes than this in one pass writes past the caches."""
set_stream_above: Callable[[int], int] = sys.modules[NAME].set_stream_above if LOADED else _not_loaded
"""Changes :data:`stream_above`, returns the former; 0 makes every pass a large one."""

"""The only importer of the compiled extension ``tolaria._C``: check its build info, load it, explain failure.

The build info is compared before the extension is opened, because a build for another torch fails with an
undefined symbol at best. Whatever goes wrong becomes one sentence in :data:`LOAD_ERROR`, which ends with the
remedy; nothing is raised here, so that the reference and ``tolaria doctor`` work without an extension. One
built in place that is older than its sources is loaded with a warning.

A source tree without an extension hides an installed tolaria where it is the current folder (``python -m``, a
prompt, a notebook). It then takes the installed extension, if that was built from the very same sources.

What ``tolaria build`` left in its cache for this torch and these sources is taken where there is no extension
beside the package, or none that fits, or an earlier one (a CPU build, say, and now there is one for CUDA).
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import torch

from tolaria._build.cache import newest_build
from tolaria._build.info import FILE_NAME, BuildInfo, mismatch, python_version, read_build_info
from tolaria._build.sources import csrc, source_digest
from tolaria._build.systems import unsupported_system
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

CALLS = (
    "assume_memory_limit",
    "control_group_limit",
    "judge",
    "last_level_cache",
    "memory_limit",
    "recording",
    "set_stream_above",
    "stream_above",
)
"""What its module itself offers, beside torch's dispatcher."""


def is_checkout(folder: Path) -> bool:
    """Whether a package folder is that of a source tree, where an extension can be built in place."""
    return (folder.parent / "setup.py").is_file() and (folder.parent / "csrc").is_dir()


def rebuild_command(folder: Path) -> str:
    """How to build the extension: in place in a checkout, else into the cache."""
    return "`python setup.py build_ext --inplace`" if is_checkout(folder) else "`tolaria build`"


def outdated_sentence(folder: Path) -> str | None:
    """In a checkout: that a file of csrc is newer than the extension built in place, if one is."""
    built = [path.stat().st_mtime for path in folder.glob("_C.*")]
    sources = [path.stat().st_mtime for path in (folder.parent / "csrc").rglob("*.*")]
    if not built or not sources or max(sources) <= max(built):
        return None
    return f"csrc has changed since the extension was built; run {rebuild_command(folder)}"


def _check(folder: Path, info: BuildInfo | None, present: bool) -> TolariaError | None:
    """What stands against loading the extension in ``folder``, before it is opened."""
    remedy, python = f"run {rebuild_command(folder)}", python_version()
    if not present:
        if why_not := unsupported_system():
            return ExtensionMissingError(f"{NAME}: {why_not}, and set TOLARIA_BACKEND=reference")
        if info is not None and info.extension and info.python != python:
            return BuildMismatchError(f"{NAME}: built for Python {info.python}, found {python}; {remedy}")
        why = "installed without it by TOLARIA_BUILD=0" if info and not info.extension else "it was not built"
        return ExtensionMissingError(f"{NAME}: there is no compiled extension ({why}); to get it, {remedy}")
    if info is None or not info.extension:
        return BuildMismatchError(f"{NAME}: expected build info beside the extension, found none; {remedy}")
    difference = mismatch(info, torch.__version__, torch.version.cuda, python)
    return BuildMismatchError(f"{NAME}: {difference}; {remedy}") if difference else None


def _installed() -> Path | None:
    """The folder of an installed tolaria with an extension, other than this package."""
    for distribution in importlib.metadata.distributions(name="tolaria"):
        folder = Path(str(distribution.locate_file("tolaria"))).resolve()
        if folder != FOLDER and any(folder.glob("_C.*")):
            return folder
    return None


def _is_present(folder: Path) -> bool:
    """Whether there is an extension for this Python in a folder."""
    return importlib.machinery.PathFinder.find_spec(NAME, [str(folder)]) is not None


def _candidates() -> Iterator[Path]:
    """Where to look: the package, an installation that it hides, the cache; of two, the later build first."""
    cached = newest_build(torch.__version__, torch.version.cuda, csrc(FOLDER))
    is_later = cached is not None and _built_at(cached) > _built_at(FOLDER)
    if cached is not None and is_later:
        yield cached
    yield FOLDER
    installed = _hidden_by_this_tree()
    if installed is not None and _has_these_sources(installed):
        yield installed
    if cached is not None and not is_later:
        yield cached


def _built_at(folder: Path) -> float:
    """When the extension in a folder was built; 0 if there is none."""
    try:
        return (folder / FILE_NAME).stat().st_mtime if _is_present(folder) else 0.0
    except OSError:
        return 0.0


def _hidden_by_this_tree() -> Path | None:
    """The installed extension, if this is a source tree without one of its own."""
    return _installed() if is_checkout(FOLDER) and not _is_present(FOLDER) else None


def _has_these_sources(folder: Path) -> bool:
    """Whether the extension in a folder was built from the sources that belong to this package."""
    info = read_build_info(folder)
    return info is not None and info.sources == source_digest(csrc(FOLDER))


def _hidden() -> TolariaError | None:
    """That this is a source tree without an extension, before an installed tolaria with another one."""
    installed = _hidden_by_this_tree()
    if installed is None:
        return None
    return ExtensionMissingError(
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


def _attempt(folder: Path) -> tuple[BuildInfo | None, TolariaError | None]:
    """Load the extension in a folder if it fits; its build info, and what went wrong."""
    info = read_build_info(folder)
    error = _check(folder, info, _is_present(folder))
    if error is None:
        try:
            _import(folder)
        except ImportError as failure:
            reason = str(failure).strip().split("\n")[0]
            anew = "`tolaria build --force`" if folder != FOLDER else rebuild_command(folder)
            return info, BuildMismatchError(f"{NAME}: cannot be loaded ({reason}); run {anew}")
        with_cuda = info is not None and info.cuda is not None
        error = _older((*OPS, *CUDA_OPS) if with_cuda else OPS, CALLS)
    return info, error


def _load() -> tuple[BuildInfo | None, Path, TolariaError | None]:
    """Load the first extension that fits; the build info, the folder it is from, and what went wrong."""
    failed: list[tuple[BuildInfo | None, Path, TolariaError]] = []
    for folder in _candidates():
        info, error = _attempt(folder)
        if error is None:
            outdated = outdated_sentence(FOLDER)
            if outdated is not None:
                warnings.warn(f"{NAME}: {outdated}", RuntimeWarning, stacklevel=1)
            return info, folder, None
        failed.append((info, folder, error))
        if NAME in sys.modules:  # its ops are registered, which those of a second one cannot be
            break
    misfits = [each for each in failed if isinstance(each[2], BuildMismatchError)]
    if not misfits and (hidden := _hidden()):
        return failed[0][0], FOLDER, hidden
    return (misfits or failed)[0]


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
"""The folder with the extension: :data:`FOLDER`, one of the cache, or of the tolaria that this tree hides."""
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
memory_limit: Callable[[], int] = sys.modules[NAME].memory_limit if LOADED else _not_loaded
"""Bytes of memory this process may have, by the machine and by its container, as the ops see it."""
assume_memory_limit: Callable[[int], int] = sys.modules[NAME].assume_memory_limit if LOADED else _not_loaded
"""For tests: sets what :data:`memory_limit` says, returns the former."""
control_group_limit: Callable[[str], int] = sys.modules[NAME].control_group_limit if LOADED else _not_loaded
"""What the control groups allow, read below another root folder: for tests."""

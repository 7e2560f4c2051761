"""Where ``tolaria build`` keeps what it built, and where the loader finds it.

``<cache>/builds/<key>/<number>`` holds an extension and its build info. The key says what runs it and of which
sources it is; the number goes up with every build of one key, so that a new one takes over at once and never
replaces files that a process may be about to open.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

from tolaria._build.sources import source_digest


def cache_folder() -> Path | None:
    """``$TOLARIA_CACHE``, else ``$XDG_CACHE_HOME/tolaria``, else ``~/.cache/tolaria``; None without a home."""
    named = os.environ.get("TOLARIA_CACHE")
    try:
        if named:
            return Path(named).expanduser().absolute()
        base = Path(os.environ.get("XDG_CACHE_HOME") or "")  # the standard ignores one that is relative
        return (base if base.is_absolute() else Path.home() / ".cache") / "tolaria"
    except RuntimeError:  # neither HOME nor an entry for this user
        return None


def build_key(torch_version: str, torch_cuda: str | None, digest: str) -> str:
    """What a cached build is for: torch, its CUDA, the ABI of Python with the processor, the sources."""
    abi = sysconfig.get_config_var("SOABI") or sysconfig.get_platform()
    cuda = "cpu" if torch_cuda is None else f"cuda{torch_cuda}"
    return f"torch{torch_version}-{cuda}-{abi}-{digest[:16]}"


def numbered(place: Path) -> dict[int, Path]:
    """The builds of one key, oldest first."""
    try:
        found = {int(path.name): path for path in place.iterdir() if path.name.isdigit()}
    except OSError:
        return {}
    return dict(sorted(found.items()))


def newest_build(torch_version: str, torch_cuda: str | None, csrc: Path) -> Path | None:
    """The folder with the cached extension for this torch and these sources, if there is one."""
    cache = cache_folder()
    if cache is None or not any((cache / "builds").glob(f"torch{torch_version}-*")):
        return None  # without having read the sources
    key = build_key(torch_version, torch_cuda, source_digest(csrc))
    builds = numbered(cache / "builds" / key)
    return list(builds.values())[-1] if builds else None

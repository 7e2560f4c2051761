"""What ``device_day.sh`` asks of Python: ``machine``, ``extension``, ``lacks MODULE...``.

``machine`` prints the number of CUDA devices, their capabilities (``-``: none), 1 if they are virtual, and
the machine in words. ``extension`` prints what runs; its status is 0 if it was built in this tree, from the
sources as they are now and with machine code for every visible device. ``lacks`` prints the modules that are
not there.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path

import torch


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _capabilities() -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(count)]


def machine() -> str:
    """The facts that the script branches on, then words."""
    found = _capabilities()
    words = f"{torch.cuda.get_device_name() if found else 'no CUDA device'}, {os.cpu_count()} processors"
    words += f", torch {torch.__version__}, Python {platform.python_version()}"
    return f"{len(found)} {';'.join(sorted(set(found))) or '-'} {int(_is_there('vgpu'))} {words}"


def extension() -> str:
    """What was built.

    Raises:
        SystemExit: it is not what this tree and this machine need; says why.
    """
    from tolaria import _extension
    from tolaria._build.sources import source_digest

    root, info = Path(__file__).resolve().parent.parent, _extension.INFO
    if info is None or not _extension.LOADED:
        sys.exit(str(_extension.LOAD_ERROR))
    if _extension.PLACE.resolve() != root / "tolaria" or info.sources != source_digest(root / "csrc"):
        sys.exit(f"the extension in {_extension.PLACE} was not built in place from these sources")
    missing = set(_capabilities()) - {arch.removesuffix("+PTX") for arch in info.archs}
    if missing:
        sys.exit(f"the extension has kernels for {info.archs or 'no GPU'}, not for {sorted(missing)}")
    target = f"CUDA {' '.join(info.archs)}" if info.archs else "the CPU"
    return f"for {target}, torch {info.torch}, {info.compiler}"


if __name__ == "__main__":
    what, *modules = sys.argv[1:]
    if what == "lacks":
        print(*(module for module in modules if not _is_there(module)))
    else:
        print({"machine": machine, "extension": extension}[what]())

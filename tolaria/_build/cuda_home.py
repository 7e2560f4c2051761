"""Find the CUDA toolkit and decide whether to build for CUDA: by facts, without asking for a device.

``torch.utils.cpp_extension`` takes ``dirname(dirname(nvcc))`` for the toolkit, which is wrong where nvcc is a
wrapper script. Here nvcc itself is asked, and a folder counts only if all that a build needs is in it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tolaria.errors import BuildError

WANTED_ARCHS = ((8, 0), (9, 0))
"""Compute capabilities built by default; the newest also as PTX, which newer devices compile themselves."""

NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fmad=false",  # no contraction, so that CUDA and CPU agree bit for bit
    "-Xcompiler=-ffp-contract=off",
    "-Xcompiler=-fvisibility=hidden",
    "-Xptxas=-warn-spills",  # a register that does not fit is a warning
]

Arch = tuple[int, int]


@dataclass(frozen=True)
class Toolkit:
    """A complete CUDA toolkit."""

    root: Path
    version: tuple[int, int]
    include_dirs: tuple[Path, ...]
    library_dirs: tuple[Path, ...]
    cudart: str = "cudart"
    """The runtime as the linker is to look for it: pip's packages have no ``libcudart.so``, only one with a number."""

    @property
    def nvcc(self) -> Path:
        """The compiler driver of this toolkit."""
        return self.root / "bin" / "nvcc"


@dataclass
class Search:
    """The outcome of a search: the toolkit, if any, and why each rejected folder was rejected."""

    toolkit: Toolkit | None = None
    rejected: list[str] = field(default_factory=list)

    def trail(self) -> str:
        """The rejected folders in words."""
        return "; ".join(self.rejected) or "neither CUDA_HOME nor nvcc nor /usr/local/cuda is there"


def _output(*command: str) -> str:
    """Standard output and error of a command, or nothing if it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def candidates(environ: Mapping[str, str], *others: tuple[str, Path]) -> Iterator[tuple[str, Path]]:
    """Folders that may hold the toolkit, best first, each with where it comes from."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(name):
            yield name, Path(environ[name])
    nvcc = shutil.which("nvcc", path=environ.get("PATH", ""))
    if nvcc is not None:
        plan = _output(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull)
        top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
        if top is not None:
            yield "nvcc --dryrun", Path(top.group(1).strip())
        yield "nvcc on PATH", Path(nvcc).resolve().parent.parent
    yield from others


def _distinct(folders: Iterable[Path]) -> tuple[Path, ...]:
    """The folders without those that are links to an earlier one."""
    return tuple({folder.resolve(): folder for folder in folders})


def inspect(root: Path) -> Toolkit | str:
    """The toolkit in ``root``, or what is missing there."""
    includes = [root / "include", *sorted(root.glob("targets/*/include"))]
    libraries = [root / "lib64", root / "lib", *sorted(root.glob("targets/*/lib"))]
    include_dirs = _distinct(folder for folder in includes if (folder / "cuda_runtime.h").is_file())
    runtimes = sorted((path for folder in libraries for path in folder.glob("libcudart.so*")), key=_by_length)
    library_dirs = _distinct(path.parent for path in runtimes)
    nvcc = root / "bin" / "nvcc"
    parts = {"cuda_runtime.h": include_dirs, "libcudart.so": library_dirs, "bin/nvcc": nvcc.is_file()}
    missing = [name for name, found in parts.items() if not found]
    if missing:
        return f"no {', no '.join(missing)}"
    release = re.search(r"release (\d+)\.(\d+)", _output(str(nvcc), "--version"))
    if release is None:
        return "bin/nvcc does not tell its version"
    name = runtimes[0].name
    return Toolkit(
        root,
        (int(release.group(1)), int(release.group(2))),
        include_dirs,
        library_dirs,
        "cudart" if name == "libcudart.so" else f":{name}",
    )


def _by_length(path: Path) -> int:
    """Orders ``libcudart.so`` before ``libcudart.so.13`` before ``libcudart.so.13.0.96``."""
    return len(path.name)


def find_toolkit(
    environ: Mapping[str, str] | None = None,
    default: Path = Path("/usr/local/cuda"),
    pip: Path | None = None,
) -> Search:
    """Look for a complete toolkit.

    Args:
        environ: where ``CUDA_HOME``, ``CUDA_PATH`` and ``PATH`` are read; default ``os.environ``.
        default: the folder tried last.
        pip: the folder where pip's packages of the wanted CUDA are (``nvidia/cu13``): complete if the one
            with nvcc is among them. Tried before ``default``, as it belongs to the environment built for.
    """
    search = Search()
    seen: set[Path] = set()
    others = ([("pip", pip)] if pip is not None else []) + [("default", default)]
    for source, folder in candidates(os.environ if environ is None else environ, *others):
        root = folder.resolve()
        if root in seen:
            continue
        seen.add(root)
        found = inspect(root) if root.is_dir() else "no such folder"
        if isinstance(found, Toolkit):
            search.toolkit = found
            return search
        search.rejected.append(f"{root} ({source}): {found}")
    return search


def choose(torch_version: str, torch_cuda: str | None, wish: bool | None, search: Search) -> tuple[bool, str]:
    """Decide between a CPU and a CUDA build.

    Args:
        torch_version: ``torch.__version__``.
        torch_cuda: ``torch.version.cuda``.
        wish: what ``TOLARIA_CUDA`` says: True demands CUDA, False forbids it, None leaves it to the facts.
        search: the outcome of :func:`find_toolkit`.

    Returns:
        Whether to build for CUDA, and why.

    Raises:
        BuildError: CUDA is demanded and cannot be built, or toolkit and torch differ in CUDA major version.
    """
    if wish is False:
        return False, "TOLARIA_CUDA=0"
    if torch_cuda is None:
        if wish:
            raise BuildError(
                f"TOLARIA_CUDA=1: expected a CUDA build of torch, got torch {torch_version} for the CPU; "
                "install a CUDA build of torch, or unset TOLARIA_CUDA"
            )
        return False, f"torch {torch_version} is a CPU build"
    major = torch_cuda.split(".")[0]
    if search.toolkit is None:
        missing = f"no complete CUDA toolkit was found ({search.trail()})"
        remedy = f"install the CUDA {major} toolkit, or point CUDA_HOME at it"
        if wish:
            raise BuildError(f"TOLARIA_CUDA=1: {missing}; {remedy}")
        return False, f"torch {torch_version} is built for CUDA {torch_cuda}, but {missing}; {remedy}"
    version = ".".join(map(str, search.toolkit.version))
    if version.split(".")[0] != major:
        raise BuildError(
            f"torch {torch_version} is built for CUDA {torch_cuda}, but the toolkit in {search.toolkit.root} "
            f"is CUDA {version}; point CUDA_HOME at a CUDA {major} toolkit, or set TOLARIA_CUDA=0 to build "
            "for the CPU alone"
        )
    return True, f"torch {torch_version} and the toolkit {version} in {search.toolkit.root}"


def supported_archs(toolkit: Toolkit) -> set[Arch]:
    """The compute capabilities that nvcc can compile for."""
    names = re.findall(r"compute_(\d+)(\d)\b", _output(str(toolkit.nvcc), "--list-gpu-arch"))
    return {(int(major), int(minor)) for major, minor in names}


def arch_list(supported: set[Arch], visible: Sequence[Arch] = ()) -> str:
    """A value for ``TORCH_CUDA_ARCH_LIST``: what we want and what is plugged in, as far as nvcc knows it.

    Args:
        supported: the capabilities that nvcc knows.
        visible: the capabilities of the devices in this machine, often none.
    """
    archs = sorted(supported.intersection((*WANTED_ARCHS, *visible)))
    if not archs:
        if not supported:
            raise BuildError(
                "nvcc --list-gpu-arch names no architecture; set TORCH_CUDA_ARCH_LIST, for example to 8.0+PTX"
            )
        archs = [min(supported)]
    return ";".join(f"{major}.{minor}" for major, minor in archs) + "+PTX"


def built_archs(flags: Iterable[str]) -> list[str]:
    """What nvcc's ``-gencode`` flags build, in the numbers of ``TORCH_CUDA_ARCH_LIST``, names resolved."""
    built: dict[str, bool] = {}
    for found in re.finditer(r"code=(sm|compute)_(\d+)(\d)([af]?)", " ".join(flags)):
        kind, major, minor, suffix = found.groups()
        arch = f"{major}.{minor}{suffix}"
        built[arch] = built.get(arch, False) or kind == "compute"
    return [arch + ("+PTX" if has_ptx else "") for arch, has_ptx in built.items()]

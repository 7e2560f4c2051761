"""What to build: CPU or CUDA, from which files, with which flags; setup.py and ``tolaria build`` both ask here."""

from __future__ import annotations

import os
import shlex
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tolaria._build import compiler, cuda_home, info, sources
from tolaria._build.systems import unsupported_system
from tolaria.errors import BuildError

if TYPE_CHECKING:
    from setuptools import Extension

EXTENSION = "tolaria._C"
CXX_FLAGS = [
    "-std=c++20",  # torch adds the standard of its own headers where none is named: C++17 up to 2.11
    "-O3",
    "-g0",
    "-ffp-contract=off",  # one arithmetic for every instruction set and for CUDA
    "-fno-math-errno",
    "-fno-trapping-math",  # lets selects vectorise; changes no value
    "-fvisibility=hidden",  # what a process loads beside us has templates of the same names
    "-fvisibility-inlines-hidden",
    "-Wall",
    "-Wextra",
]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to build the extension; :func:`make_plan` finds it."""

    reason: str
    """Why for the CPU or for CUDA."""
    toolkit: cuda_home.Toolkit | None
    """Compiles the CUDA kernels; None: for the CPU alone."""
    archs: tuple[str, ...]
    """The CUDA architectures, as in ``TORCH_CUDA_ARCH_LIST``, names resolved."""
    cxx: list[str]
    """The command of the C++ compiler."""
    openmp: list[str]
    """The flags that give it OpenMP; empty where it has none."""

    def describe(self) -> str:
        """What is built, and why."""
        return f"for {'CUDA ' + ';'.join(self.archs) if self.archs else 'the CPU'}: {self.reason}"

    def build_info(self, csrc: Path, git: str | None = None) -> info.BuildInfo:
        """What is to be recorded of a build of ``csrc``.

        Args:
            csrc: the folder with the sources.
            git: the commit; default: what the package's own record says of these sources.
        """
        import torch

        digest, carried = sources.source_digest(csrc), info.read_build_info(sources.PACKAGE)
        if git is None and carried is not None and carried.sources == digest:
            git = carried.git
        return info.BuildInfo(
            extension=True,
            reason=self.reason,
            python=info.python_version(),
            git=git,
            torch=torch.__version__,
            cuda=torch.version.cuda if self.toolkit else None,
            toolkit=".".join(map(str, self.toolkit.version)) if self.toolkit else None,
            archs=self.archs,
            compiler=compiler.describe(self.cxx),
            sources=digest,
            cxx_flags=(*CXX_FLAGS, *self.openmp),
            nvcc_flags=tuple(cuda_home.NVCC_FLAGS) if self.toolkit else (),
        )

    def extension(self, csrc: Path, root: Path | None = None) -> Extension:
        """The extension for setuptools and torch's ``BuildExtension``.

        Args:
            csrc: the folder with the sources.
            root: the folder to which the names of the sources are to be relative, as setuptools wants them of
                a project.
        """
        from torch.utils.cpp_extension import CppExtension, CUDAExtension, include_paths

        toolkit = self.toolkit
        make: Callable[..., Extension] = CUDAExtension if toolkit else CppExtension
        units = sources.units(csrc, with_cuda=toolkit is not None)
        include_dirs = [csrc, *(toolkit.include_dirs if toolkit else ())]
        not_ours = [f"-isystem{folder}" for folder in include_paths()]  # our warnings only
        extension = make(
            EXTENSION,
            [path.relative_to(root).as_posix() if root else str(path) for path in units],
            include_dirs=[str(folder) for folder in include_dirs],
            library_dirs=[str(folder) for folder in (toolkit.library_dirs if toolkit else ())],
            define_macros=[("TOLARIA_WITH_CUDA", None)] if toolkit else [],
            extra_compile_args={
                "cxx": CXX_FLAGS + self.openmp + not_ours,
                "nvcc": cuda_home.NVCC_FLAGS,
            },
            extra_link_args=self.openmp,
        )
        if toolkit:
            extension.libraries = [toolkit.cudart if name == "cudart" else name for name in extension.libraries]
        return extension


def switch(name: str) -> bool | None:
    """An environment variable that is 0, 1 or unset."""
    value = os.environ.get(name, "")
    if value not in {"", "0", "1"}:
        raise BuildError(f"{name}: expected 0 or 1, got {value!r}; set it to one of them or unset it")
    return None if value == "" else value == "1"


def make_plan() -> Plan:
    """Look at this machine: compiler, torch, CUDA toolkit.

    Sets in ``os.environ`` what torch's build commands read: ``CUDA_HOME``; ``CXX``, ``TORCH_CUDA_ARCH_LIST``
    and ``MAX_JOBS`` unless they are set; and ninja's place in ``PATH``.

    Raises:
        BuildError: something is missing, or does not fit together.
    """
    if why_not := unsupported_system():
        raise BuildError(f"the extension: {why_not}")
    cxx = compiler.find_compiler()
    try:
        import torch
    except ImportError as error:
        raise BuildError(
            f"torch is needed to build the extension and cannot be imported ({error}); "
            "run `pip install torch` first, or set TOLARIA_BUILD=0 to install without the extension"
        ) from None
    wish, search = switch("TOLARIA_CUDA"), cuda_home.find_toolkit(pip=_pip_toolkit(torch.version.cuda))
    with_cuda, reason = cuda_home.choose(torch.__version__, torch.version.cuda, wish, search)
    toolkit = search.toolkit if with_cuda else None
    archs = _prepare_cuda(toolkit) if toolkit else ()
    os.environ["CXX"] = shlex.join(cxx)
    os.environ.setdefault("MAX_JOBS", str(compiler.max_jobs()))
    scripts = sysconfig.get_path("scripts")  # where pip puts ninja in a venv
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, [os.environ.get("PATH"), scripts]))
    return Plan(reason=reason, toolkit=toolkit, archs=archs, cxx=cxx, openmp=compiler.openmp_flags(cxx))


def _pip_toolkit(cuda: str | None) -> Path | None:
    """Where pip's packages of torch's CUDA are, beside torch."""
    import torch

    return None if cuda is None else Path(torch.__file__).parents[1] / "nvidia" / f"cu{cuda.split('.')[0]}"


def _prepare_cuda(toolkit: cuda_home.Toolkit) -> tuple[str, ...]:
    """Tell torch which toolkit and architectures to use; the architectures, as numbers."""
    import torch

    os.environ["CUDA_HOME"] = str(toolkit.root)  # torch.utils.cpp_extension reads it when imported
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        visible = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        supported = cuda_home.supported_archs(toolkit)
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_home.arch_list(supported, visible)
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    return tuple(cuda_home.built_archs(_get_cuda_arch_flags()))  # a list may also name architectures

"""Build ``tolaria._C``: pick CPU or CUDA, list sources and flags; the rest is in build_tools/."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))

import backend  # noqa: E402
import build_info  # noqa: E402
import compiler  # noqa: E402
import cuda_home  # noqa: E402
from cuda_home import BuildError  # noqa: E402

BUILD_COMMANDS = {"bdist", "bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
CXX_FLAGS = [
    "-std=c++20",  # torch adds the standard of its own headers where none is named: C++17 up to 2.11
    "-O3",
    "-g0",
    "-ffp-contract=off",  # one arithmetic for every instruction set and for CUDA
    "-fno-math-errno",
    "-fno-trapping-math",  # lets selects vectorise; changes no value
    "-Wall",
    "-Wextra",
]


def switch(name: str) -> bool | None:
    """An environment variable that is 0, 1 or unset."""
    value = os.environ.get(name, "")
    if value not in {"", "0", "1"}:
        raise BuildError(f"{name}: expected 0 or 1, got {value!r}; set it to one of them or unset it")
    return None if value == "" else value == "1"


def sources(with_cuda: bool) -> list[str]:
    """Every translation unit, relative to the root; csrc/cuda belongs to a CUDA build alone."""
    units = [path.relative_to(ROOT) for kind in ("*.cpp", "*.cu") for path in (ROOT / "csrc").rglob(kind)]
    return sorted(path.as_posix() for path in units if with_cuda or path.parts[1] != "cuda")


def facts(**more: str | bool | list[str] | None) -> build_info.Info:
    """The build info common to all kinds of build, and ``more``."""
    return {"python": build_info.python_version(), "git": build_info.git_revision(ROOT), **more}


def pure_options() -> dict[str, object]:
    """No extension: the reference implementation alone."""
    info = facts(extension=False, reason="TOLARIA_BUILD=0")
    return {"cmdclass": {"build_py": build_info.recording_build_py(info)}}


def extension_options() -> dict[str, object]:
    """The extension, for CPU or CUDA, built by torch's own commands."""
    cxx = compiler.find_compiler()
    try:
        import torch
    except ImportError as error:
        raise BuildError(
            f"torch is needed to build the extension and cannot be imported ({error}); "
            "run `pip install torch` first, or set TOLARIA_BUILD=0 to install without the extension"
        ) from None
    search, wish = cuda_home.find_toolkit(), switch("TOLARIA_CUDA")
    with_cuda, reason = cuda_home.choose(torch.__version__, torch.version.cuda, wish, search)
    toolkit = search.toolkit if with_cuda else None
    archs: list[str] = []
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit.root)  # torch.utils.cpp_extension reads it when imported
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            visible = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
            supported = cuda_home.supported_archs(toolkit)
            os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_home.arch_list(supported, visible)
        from torch.utils.cpp_extension import _get_cuda_arch_flags

        archs = cuda_home.built_archs(_get_cuda_arch_flags())  # a list may also name architectures
    os.environ.setdefault("MAX_JOBS", str(compiler.max_jobs()))
    os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # where pip puts ninja in a venv
    print(f"tolaria: building for {'CUDA ' + ';'.join(archs) if archs else 'the CPU'}: {reason}", flush=True)

    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, include_paths

    openmp = compiler.openmp_flags(cxx)
    include_dirs = [ROOT / "csrc", *(toolkit.include_dirs if toolkit else ())]
    not_ours = [f"-isystem{folder}" for folder in include_paths()]  # our warnings only
    extension = (CUDAExtension if toolkit else CppExtension)(
        build_info.EXTENSION,
        sources(with_cuda),
        include_dirs=[str(folder) for folder in include_dirs],
        library_dirs=[str(folder) for folder in (toolkit.library_dirs if toolkit else ())],
        define_macros=[("TOLARIA_WITH_CUDA", None)] if toolkit else [],
        extra_compile_args={"cxx": CXX_FLAGS + openmp + not_ours, "nvcc": cuda_home.NVCC_FLAGS},
        extra_link_args=openmp,
    )
    info = facts(
        extension=True,
        reason=reason,
        torch=torch.__version__,
        cuda=torch.version.cuda if toolkit else None,
        toolkit=".".join(map(str, toolkit.version)) if toolkit else None,
        archs=archs,
        compiler=compiler.describe(cxx),
        sources=build_info.source_digest(ROOT),
        cxx_flags=CXX_FLAGS + openmp,
        nvcc_flags=cuda_home.NVCC_FLAGS if toolkit else [],
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": build_info.recording_build_ext(BuildExtension, info)},
    }


def options() -> dict[str, object]:
    """What setup() needs beyond pyproject.toml; metadata and sdist need neither torch nor a compiler."""
    if problem := backend.setuptools_problem():
        raise BuildError(problem)
    if switch("TOLARIA_BUILD") is False:
        return pure_options()
    if BUILD_COMMANDS.isdisjoint(sys.argv):
        return {"ext_modules": [Extension(build_info.EXTENSION, sources(with_cuda=False))]}
    return extension_options()


try:
    chosen = options()
except BuildError as error:
    sys.exit(f"tolaria: {error}")
setup(**chosen)

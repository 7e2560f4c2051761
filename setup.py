"""Build the extension ``tolaria._C`` with torch.utils.cpp_extension."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
setup(
    ext_modules=[
        CppExtension(
            "tolaria._C",
            sources,
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={
                "cxx": [
                    "-O3",
                    "-g0",
                    "-fopenmp",  # at::parallel_for is serial without it; torch ships the same libgomp.so.1
                    "-ffp-contract=off",  # one arithmetic for every instruction set and for CUDA
                    "-fno-math-errno",
                    "-fno-trapping-math",  # lets selects vectorise; changes no value
                    "-Wall",
                    "-Wextra",
                ]
            },
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)

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
            extra_compile_args={"cxx": ["-O3", "-g0", "-ffp-contract=off", "-Wall", "-Wextra"]},
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)

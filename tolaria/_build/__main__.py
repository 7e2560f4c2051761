"""``python -m tolaria._build FOLDER``: compile the extension into a folder; a process of its own for the cache."""

from __future__ import annotations

import sys
from pathlib import Path

from tolaria._build import plan, sources
from tolaria._build.info import write_build_info


def compile_into(folder: Path, objects: Path) -> None:
    """Compile the extension, by torch's own command for setuptools.

    Args:
        folder: where the extension and its build info go.
        objects: where what lies between goes.
    """
    chosen, csrc = plan.make_plan(), sources.csrc()
    from setuptools import Distribution
    from torch.utils.cpp_extension import BuildExtension

    # no setup(): that would read the pyproject.toml and setup.cfg of the current folder
    command = BuildExtension(Distribution({"name": "tolaria", "ext_modules": [chosen.extension(csrc)]}))
    command.build_lib, command.build_temp = str(objects / "lib"), str(objects / "temp")
    command.ensure_finalized()
    command.run()
    built = Path(command.get_ext_fullpath(plan.EXTENSION))
    built.rename(folder / built.name)
    write_build_info(folder, chosen.build_info(csrc))


if __name__ == "__main__":
    try:
        compile_into(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:  # the compiler has said the rest
        sys.exit(f"{type(error).__name__}: {error}")

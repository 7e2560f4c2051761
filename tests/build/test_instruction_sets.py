"""The kernels compile for Arm, and every compiler makes AVX-512 loops of those that ask for them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ARM = "aarch64-linux-gnu-g++"
PROBE = """
#include "cpu/isa.h"
struct Scale {
  static TOLARIA_INLINE void run(float* out, const float* in, long n) {
    TOLARIA_ELEMENTWISE
    for (long i = 0; i < n; ++i) out[i] = in[i] * 3 + 1;
  }
};
void scale(float* out, const float* in, long n) { tolaria::cpu::vectorised<Scale>(out, in, n); }
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 machine")
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_loop_for_avx512_uses_its_registers(compiler, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    (tmp_path / "probe.cpp").write_text(PROBE)
    command = [compiler, "-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    command += ["-Wall", "-Wextra", "-Werror", f"-I{CSRC}", "-S", "probe.cpp", "-o", "probe.s"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loops = (tmp_path / "probe.s").read_text()
    assert "%zmm" in loops
    assert "%ymm" in loops


def test_what_names_an_instruction_set_is_compiled_for_arm_below():
    named = {
        str(path.relative_to(CSRC))
        for path in CSRC.rglob("*.*")
        if re.search(r"immintrin|\b_mm|run_avx|\bkIsa\b|__x86", path.read_text())
    }
    assert named == {"cpu/isa.h", "cpu/pack.h", "cpu/stream.h", "cpu/governor.cpp"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(ARM) is None, reason=f"needs {ARM}")
@pytest.mark.parametrize("source", ["governor", "snapshot"])
def test_kernels_compile_for_arm(source):
    """torch's headers are the same on both machines, as far as they are needed here."""
    headers = Path(torch.__file__).parent / "include"
    command = [ARM, "-std=c++20", "-O0", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", "-S", "-o", os.devnull]
    for folder in (headers, headers / "torch" / "csrc" / "api" / "include", sysconfig.get_path("include")):
        command += ["-isystem", str(folder)]
    done = subprocess.run(
        [*command, str(CSRC / "cpu" / f"{source}.cpp")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

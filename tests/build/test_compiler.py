from __future__ import annotations

import compiler
import pytest
from cuda_home import BuildError


def test_missing_compiler_is_one_sentence_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        BuildError, match=r"found none on PATH; install g\+\+ or clang\+\+, or set TOLARIA_BUILD=0"
    ):
        compiler.find_compiler()


def test_named_compiler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="found CXX=no-such-compiler, which is not on PATH"):
        compiler.find_compiler()


def test_missing_python_headers_are_named(monkeypatch, tmp_path):
    (tmp_path / "c++").touch(mode=0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    monkeypatch.setattr(compiler.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(BuildError, match=r"found no .*Python\.h; install python3\.\d+-dev"):
        compiler.find_compiler()


@pytest.mark.parametrize(
    ("free", "cores", "jobs"), [(1.0, 8, 1), (7.9, 8, 3), (64.0, 4, 4), (float("inf"), 2, 2)]
)
def test_jobs_respect_cores_and_memory(monkeypatch, free, cores, jobs):
    monkeypatch.setattr(compiler, "_free_gib", lambda: free)
    monkeypatch.setattr(compiler.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert compiler.max_jobs() == jobs

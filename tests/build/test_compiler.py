from __future__ import annotations

import pytest

from tolaria._build import compiler, plan
from tolaria._build.systems import unsupported_system
from tolaria.errors import BuildError


def test_missing_compiler_is_one_sentence_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"found none on PATH; install g\+\+ or clang\+\+, or do without: "):
        compiler.find_compiler()


def test_named_compiler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="found CXX=no-such-compiler, which is not on PATH"):
        compiler.find_compiler()


def test_missing_python_headers_are_named(monkeypatch, tmp_path):
    (tmp_path / "c++").write_text("#!/bin/sh\n")
    (tmp_path / "c++").chmod(0o755)
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


def test_old_compiler_is_named(monkeypatch, tmp_path):
    """g++ 9 does not know -std=c++20; what it makes of the sources is a page of errors."""
    old = tmp_path / "g++"
    old.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        "*-std=c++20*) echo 'g++: error: unrecognized command line option' >&2; exit 1 ;;\n"
        "*--version*) echo 'g++ (Debian) 9.4.0' ;;\nesac\n"
    )
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(
        BuildError, match=r"expected a compiler for C\+\+20, got g\+\+ \(Debian\) 9\.4\.0; point"
    ):
        compiler.find_compiler()


@pytest.mark.parametrize(("platform", "name"), [("darwin", "macOS"), ("win32", "Windows")])
def test_other_systems_are_refused_before_a_compiler_is_looked_for(monkeypatch, platform, name):
    monkeypatch.setattr(plan, "unsupported_system", lambda: unsupported_system(platform))
    monkeypatch.setattr(plan.compiler, "find_compiler", lambda: pytest.fail("a compiler was looked for"))
    with pytest.raises(
        BuildError, match=f"expected Linux, got {name}, where .*; install with TOLARIA_BUILD=0"
    ):
        plan.make_plan()


def test_the_compiler_that_is_found_is_the_one_that_compiles(monkeypatch, tmp_path):
    """torch's commands take ``c++`` where CXX is not set, whatever Python was built with."""
    monkeypatch.setenv("CXX", "g++ -pipe")
    monkeypatch.setattr(plan.os, "environ", dict(plan.os.environ))
    monkeypatch.setattr(plan.compiler, "find_compiler", lambda: ["clang++"])
    monkeypatch.setattr(plan.compiler, "openmp_flags", lambda cxx: [])
    monkeypatch.setenv("TOLARIA_CUDA", "0")
    plan.make_plan()
    assert plan.os.environ["CXX"] == "clang++"


GIB = 1 << 30
V2 = "30 23 0:26 {top} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = "35 31 0:32 {top} /sys/fs/cgroup rw - cgroup cgroup rw,memory\n"
MEMORY = "MemTotal: 99999999 kB\nMemAvailable: 67108864 kB\n"  # 64 GiB


@pytest.mark.parametrize(
    ("mounts", "groups", "files", "free"),
    [
        (V2, "0::/\n", {}, 64),
        (V2, "0::/\n", {"memory.max": f"{4 * GIB}", "memory.current": f"{GIB}"}, 3),
        (V2, "0::/\n", {"memory.max": "max", "memory.high": f"{4 * GIB}", "memory.current": f"{GIB}"}, 3),
        (
            V2,
            "0::/a/b\n",
            {"a/memory.max": f"{4 * GIB}", "a/memory.current": "0", "a/b/memory.max": "max"},
            4,
        ),
        (V2, "0::/../a\n", {"memory.max": f"{4 * GIB}", "memory.current": "0"}, 4),
        (V2, "nonsense\n", {"memory.max": f"{4 * GIB}", "memory.current": "0"}, 64),
        (V1, "3:cpu:/a\n2:memory:/b\n", {"memory.limit_in_bytes": "0"}, 64),  # no usage: not ours to read
        (V1, "2:memory:/b\n", {"memory.limit_in_bytes": f"{4 * GIB}", "memory.usage_in_bytes": f"{GIB}"}, 3),
        (
            V1.format(top="/b"),
            "2:memory:/b\n",
            {"memory.limit_in_bytes": f"{GIB}", "memory.usage_in_bytes": "0"},
            1,
        ),
        ("", "0::/\n", {}, 64),
    ],
)
def test_free_memory_is_that_of_the_container(tmp_path, mounts, groups, files, free):
    texts = {
        "proc/meminfo": MEMORY,
        "proc/self/mountinfo": mounts.format(top="/"),
        "proc/self/cgroup": groups,
    }
    for name, text in (texts | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert compiler._free_gib(tmp_path) == free


def test_free_memory_is_unlimited_where_nobody_tells(tmp_path):
    assert compiler._free_gib(tmp_path) == float("inf")

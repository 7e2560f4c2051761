"""How much memory a process may have: control groups of both versions, as a container shows them."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tolaria
from tolaria import _extension
from tolaria.ops import straight_through

pytestmark = pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
NONE = 2**63 - 1
UNLIMITED_V1 = 2**63 - 4096
V2 = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
HYBRID = """31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"""


def limit(root: Path, mounts: str, groups: str, files: dict[str, str]) -> int:
    """What is found below a root with these files."""
    texts = {"proc/self/mountinfo": mounts + "\n", "proc/self/cgroup": groups + "\n"}
    for name, text in (texts | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return _extension.control_group_limit(str(root))


@pytest.mark.parametrize(
    ("top", "group", "files", "expected"),
    [
        ("/", "/", {}, NONE),  # the machine's own group has no such file
        ("/", "/", {"memory.max": "1073741824\n"}, 1 << 30),  # a container in a namespace of its own
        ("/", "/", {"memory.max": "max\n", "memory.high": "max\n"}, NONE),
        ("/", "/a/b", {"a/b/memory.max": "max\n", "a/memory.max": "5000\n", "memory.max": "7000\n"}, 5000),
        ("/", "/a/b", {"a/b/memory.max": "4000\n", "a/memory.max": "5000\n"}, 4000),
        ("/", "/a/b", {"a/b/memory.max": "9000\n", "a/memory.high": "5000\n"}, 5000),
        ("/", "/a:b/c", {"a:b/memory.max": "5000\n"}, 5000),
        ("/", "/a/b", {"c/memory.max": "5000\n"}, NONE),
        ("/docker/1", "/docker/1", {"memory.max": "5000\n"}, 5000),  # the host's paths, its own group mounted
        ("/docker/1", "/docker/1/a", {"a/memory.max": "4000\n", "memory.max": "5000\n"}, 4000),
        ("/docker/1", "/docker/12", {"memory.max": "5000\n", "2/memory.max": "1\n"}, 5000),
        ("/docker/1", "/", {"memory.max": "5000\n"}, 5000),
        ("/", "/../other", {"memory.max": "5000\n", "other/memory.max": "1\n"}, 5000),  # entered from outside
        ("/", "/..", {"memory.max": "5000\n"}, 5000),
        ("/", "nonsense", {"memory.max": "5000\n"}, 5000),
        ("/", "/", {"memory.max": ""}, NONE),
        ("/", "/", {"memory.max": "-1\n"}, NONE),
        ("/", "/", {"memory.max": "99999999999999999999999\n"}, NONE),
    ],
)
def test_version_2(tmp_path, top, group, files, expected):
    assert limit(tmp_path, V2.format(top=top), f"0::{group}", files) == expected


@pytest.mark.parametrize(
    ("top", "group", "files", "expected"),
    [
        ("/", "/", {"memory.limit_in_bytes": f"{UNLIMITED_V1}\n"}, UNLIMITED_V1),
        ("/", "/a/b", {"a/memory.limit_in_bytes": "5000\n"}, 5000),
        ("/docker/1", "/docker/1", {"memory.limit_in_bytes": "5000\n"}, 5000),
        (
            "/docker/1",
            "/docker/1",  # what lies above cannot be seen, but for this
            {
                "memory.limit_in_bytes": "9000\n",
                "memory.stat": "cache 7\nhierarchical_memory_limit 6000\nrss 1\n",
            },
            6000,
        ),
        ("/", "/", {"memory.stat": f"hierarchical_memory_limit {2**64 - 1}\n"}, NONE),
    ],
)
def test_version_1(tmp_path, top, group, files, expected):
    files = {f"memory/{name}": text for name, text in files.items()}
    groups = f"9:name=systemd:/x\n4:cpu,memory:{group}\n3:cpuset:/y\n0::/"
    assert limit(tmp_path, f"{HYBRID}\n{V1.format(top=top)}", groups, files) == expected


def test_a_machine_with_both_versions_has_the_lower_limit(tmp_path):
    files = {"memory/a/memory.limit_in_bytes": "6000\n", "unified/b/memory.max": "5000\n"}
    groups = "4:memory:/a\n0::/b"
    assert limit(tmp_path, f"{HYBRID}\n{V1.format(top='/')}", groups, files) == 5000


def test_a_mount_with_a_space_in_its_path(tmp_path):
    mounts = V2.format(top="/").replace("/sys/fs/cgroup", r"/sys/fs/cgroup/my\040groups")
    assert limit(tmp_path, mounts, "0::/", {"my groups/memory.max": "5000\n"}) == 5000


@pytest.mark.parametrize("mounts", ["", "nonsense", "1 2 3 4 5 6 - cgroup2", V2.format(top="/")])
@pytest.mark.parametrize("groups", ["", "nonsense", "0:", "0::"])
def test_what_cannot_be_read_limits_nothing(tmp_path, mounts, groups):
    assert limit(tmp_path, mounts, groups, {}) == NONE
    assert _extension.control_group_limit(str(tmp_path / "nothing")) == NONE


def test_the_process_has_no_more_than_the_machine():
    found = _extension.memory_limit()
    assert 0 < found <= max(4 << 30, _extension.control_group_limit(""))
    if sys.platform == "linux":
        kib = int(Path("/proc/meminfo").read_text().split()[1])
        assert found <= kib * 1024


@pytest.fixture
def small_container() -> Iterator[int]:
    """As if 1 GiB were allowed."""
    gc.collect()
    tolaria.release_host_memory()
    former = _extension.assume_memory_limit(1 << 30)
    yield 1 << 30
    _extension.assume_memory_limit(former)
    tolaria.release_host_memory()


def test_outputs_keep_an_eighth_of_what_the_container_allows(small_container):
    host = torch.ones(1 << 23)  # 32 MiB
    outs = [straight_through(host, host) for _ in range(7)]
    del outs
    assert tolaria.release_host_memory() == small_container // 8


def test_an_output_larger_than_that_is_not_kept(small_container):
    host = torch.ones(1 << 26)  # 256 MiB
    straight_through(host, host)
    assert tolaria.release_host_memory() == 0


@contextlib.contextmanager
def real_group(nbytes: int) -> Iterator[Path]:
    """A control group with a limit, inside ours; skips where none can be made."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    kinds = {"memory": ("memory", "memory.limit_in_bytes"), "": ("", "memory.max")}
    for _, controllers, path in lines:
        folder, file = kinds.get(controllers, (None, ""))
        if folder is None:
            continue
        group = Path("/sys/fs/cgroup", folder, path.lstrip("/"), f"tolaria-{uuid.uuid4().hex}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / file).write_text(str(nbytes))
        except OSError:
            group.rmdir()
            continue
        try:
            yield group
        finally:
            group.rmdir()
        return
    pytest.skip("needs the right to make control groups with a limit")


@pytest.mark.skipif(sys.platform != "linux", reason="needs control groups")
def test_a_real_control_group_is_seen():
    program = """
import pathlib, sys, os
pathlib.Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from tolaria import _extension
print(_extension.memory_limit())
"""
    with real_group(1 << 30) as group:
        done = subprocess.run(
            [sys.executable, "-c", program, str(group)], capture_output=True, text=True, check=False
        )
        assert done.stdout.split() == [str(1 << 30)], done.stderr[-2000:]

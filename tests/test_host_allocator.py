"""tune_host_allocator: what it sets, says and undoes, in a process of its own; a clear error elsewhere."""

import ctypes
import platform
import subprocess
import sys

import pytest

import tolaria
from tolaria import _host_allocator

on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
PROGRAM = """
import ctypes, resource
import torch
import tolaria

def faults(mib):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(mib << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
plain = faults(48)
first, second = tolaria.tune_host_allocator(), tolaria.tune_host_allocator()
assert first.changed and not second.changed and "already" in str(second), (first, second)
faults(48)
kept = faults(48)
first.undo()
undone = faults(48)
assert tolaria.tune_host_allocator().changed
print(plain, kept, undone)
"""


@on_glibc
def test_freed_blocks_are_used_again_until_undone():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    plain, kept, undone = map(int, done.stdout.split())
    assert kept < plain / 10
    assert undone > 10 * kept


class NoMallopt:
    """A C library that is not glibc's."""

    def __init__(self, name):
        pass


def test_another_c_library_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", NoMallopt)
    with pytest.raises(tolaria.TolariaError, match="expected a process on glibc"):
        tolaria.tune_host_allocator()


@on_glibc
def test_a_preloaded_allocator_is_a_clear_error(monkeypatch):
    files = iter(["/lib/libjemalloc.so", "/lib/libc.so.6", "/lib/libjemalloc.so"])
    monkeypatch.setattr(_host_allocator, "_file_of", lambda libc, function: next(files))
    with pytest.raises(tolaria.TolariaError, match=r"libjemalloc\.so, not glibc's"):
        tolaria.tune_host_allocator()

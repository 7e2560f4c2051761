"""Writers that are killed, fail or meet: what was whole stays whole."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tolaria.errors import SnapshotError
from tolaria.snapshot.persist import read, write

KILLS = """
import os, random, signal, sys, time
import torch
from tolaria.snapshot.persist import newest, read, write

folder, how = sys.argv[1:]
draw = random.Random(0)


def run_on(first):
    for number in range(first, first + 10**6):
        step = number if how == "ascending" else number % 3  # which replaces
        tensors = {str(i): torch.full((20_000,), float(number)) for i in range(8)}
        write(folder, step, tensors, {"n": number})


last = 0
for kill in range(20):
    if not (child := os.fork()):
        run_on(last + 1)
    while newest(folder) is None:
        time.sleep(0.001)
    time.sleep(draw.uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    document, tensors = read(folder)
    assert document["n"] >= last, (document, last)
    last = document["n"]
    assert sorted(tensors) == [str(i) for i in range(8)]
    for tensor in tensors.values():
        assert tensor.unique().tolist() == [float(last)]
write(folder, 999_999_999, {}, {})  # beyond what any child reached
print(sorted(path for path in os.listdir(folder)))
"""
MEETINGS = """
import os, sys, warnings
import torch
from tolaria.errors import FolderInUseError
from tolaria.snapshot.persist import read, write

folder = sys.argv[1]
children = []
for rank in range(2):
    if not (child := os.fork()):
        written = 0
        while written < 30:
            try:
                number = 100 * rank + written if written % 2 else 7  # both write that
                tensors = {"w": torch.full((10_000,), float(rank))}
                write(folder, number, tensors, {"rank": rank})
                written += 1
            except FolderInUseError:
                pass
        os._exit(0)
    children.append(child)
while not all(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in children):
    if any(name.startswith("step_") for name in os.listdir(folder)):
        with warnings.catch_warnings():
            # The newest was replaced meanwhile: it says so.
            warnings.filterwarnings("ignore", ".* is read instead$", RuntimeWarning)
            document, tensors = read(folder)
        assert tensors["w"].unique().tolist() == [float(document["rank"])]
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
assert codes == [0, 0], codes
assert len([name for name in os.listdir(folder) if name.startswith("step_")]) == 2
"""


def run(script: str, *arguments: str) -> str:
    """What the script prints; a warning in it is an error."""
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """A file that grows beyond ``size`` bytes is an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ascending", "replacing"])
def test_kill_at_any_moment_leaves_a_whole_snapshot_and_the_next_writer_cleans_up(
    tmp_path: Path, how: str
) -> None:
    left = run(KILLS, str(tmp_path), how)
    assert left.startswith("['.snapshots.lock', 'step_")
    assert left.endswith(", 'step_999999999']")
    assert left.count(",") == 2


@pytest.mark.slow
def test_two_processes_that_write_and_one_that_reads_meet_in_one_folder(tmp_path: Path) -> None:
    run(MEETINGS, str(tmp_path))


def test_a_full_disk_is_a_clear_error_and_leaves_what_was_there(tmp_path: Path) -> None:
    before = write(tmp_path, 1, {"w": torch.ones(3)}, {"n": 1})
    files = {path.name: path.read_bytes() for path in before.iterdir()}
    for number in (1, 2):
        with (
            files_at_most(2**20),
            pytest.raises(
                SnapshotError, match=rf"snapshot {number} cannot be written: .*File too large"
            ) as caught,
        ):
            write(tmp_path, number, {"w": torch.ones(2**19)}, {})
        assert isinstance(caught.value.__cause__, OSError)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".snapshots.lock", "step_000000001"]
    assert {path.name: path.read_bytes() for path in before.iterdir()} == files
    assert read(tmp_path)[0] == {"n": 1}
    write(tmp_path, 2, {"w": torch.ones(2**19)}, {"n": 2})
    assert read(tmp_path)[0] == {"n": 2}


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            SnapshotError, match=r"snapshot 1 cannot be written: .*(File exists|Not a directory)"
        ):
            write(folder, 1, {}, {})
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_denies_writing_is_a_clear_error(tmp_path: Path) -> None:
    write(tmp_path, 1, {}, {"n": 1})
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(SnapshotError, match=r"snapshot 2 cannot be written: .*Permission denied"):
            write(tmp_path, 2, {}, {})
        assert read(tmp_path)[0] == {"n": 1}
    finally:
        tmp_path.chmod(0o700)


def test_a_link_in_what_is_removed_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (write(tmp_path, 1, {}, {}) / "link").symlink_to(tmp_path / "mine")
    write(tmp_path, 2, {}, {}, keep=1)
    assert (tmp_path / "mine" / "file").exists()
    assert not (tmp_path / "step_000000001").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may remove everything")
def test_an_old_one_that_cannot_be_removed_is_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path, 1, {}, {})
    path.chmod(0o500)
    with pytest.warns(RuntimeWarning, match="old snapshots cannot be removed: .*Permission denied"):
        write(tmp_path, 2, {}, {"n": 2}, keep=1)
    assert read(tmp_path)[0] == {"n": 2}
    for left in tmp_path.iterdir():
        left.chmod(0o700)
    write(tmp_path, 3, {}, {"n": 3}, keep=1)
    assert sorted(each.name for each in tmp_path.iterdir()) == [".snapshots.lock", "step_000000003"]

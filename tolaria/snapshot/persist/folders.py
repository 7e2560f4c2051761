"""The folder that holds snapshots: their names and order, who may write, what has to reach the disk."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tolaria._disk import sync_folder
from tolaria.errors import FolderInUseError, SnapshotError
from tolaria.snapshot.persist import documents
from tolaria.snapshot.persist.documents import Contents

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out there
    fcntl = None  # type: ignore[assignment]

DOCUMENT, METADATA, TENSORS = "document.json", ".metadata", "__0_0.distcp"
MOST_DIGITS = 18
_LOCK = ".snapshots.lock"
_NAME = re.compile(rf"step_([0-9]{{9,{MOST_DIGITS}}})(\.replaced)?")
_DRAFT = re.compile(r"\.step_[0-9]+\.[0-9a-f]{32}\.(part|old)")


@dataclass(frozen=True)
class Candidate:
    """A snapshot that says that it is whole; ``sequence`` is higher the later it was written."""

    path: Path
    contents: Contents


def as_path(name: str, value: object) -> Path:
    """``value`` as a path.

    Raises:
        TypeError: it is none.
        ValueError: no file can have it.
    """
    try:
        path = os.fspath(value)  # type: ignore[call-overload]
    except TypeError:
        path = None
    if not isinstance(path, str):
        raise TypeError(f"{name}: expected a path, got {type(value).__name__}")
    if not path or "\0" in path:
        raise ValueError(f"{name}: expected a path, got {path!r}")
    return Path(path)


def snapshot_name(number: int) -> str:
    """The name of a snapshot's folder."""
    return f"step_{number:09d}"


def draft_path(folder: Path, number: int, suffix: str) -> Path:
    """A name that no one else uses, of what is not there yet (``part``) or no more (``old``)."""
    return folder / f".{snapshot_name(number)}.{uuid.uuid4().hex}.{suffix}"


def replaced_path(path: Path) -> Path:
    """The second name of a snapshot, while another of the same number takes its place."""
    return path.with_name(f"{path.name}.replaced")


def number_of(path: Path) -> int | None:
    """The number in a snapshot folder's name; None if it has no such name."""
    match = _NAME.fullmatch(path.name)
    return None if match is None or snapshot_name(int(match[1])) != f"step_{match[1]}" else int(match[1])


def find(folder: Path) -> tuple[list[Candidate], list[SnapshotError]]:
    """The snapshots in a folder, the last written first, and what is wrong with the others.

    Only their documents are read, and the sizes of their files looked at.

    Raises:
        OSError: the folder cannot be listed; FileNotFoundError if it is not there.
    """
    candidates, errors = [], []
    for path in sorted(each for each in folder.iterdir() if number_of(each) is not None):
        try:
            candidates.append(Candidate(path, look(path)))
        except SnapshotError as error:
            errors.append(error)
    candidates.sort(key=lambda each: (each.contents.sequence, each.contents.number), reverse=True)
    return candidates, errors


def look(path: Path) -> Contents:
    """What the document of a snapshot says, whose files are all there, in the right size.

    Raises:
        SnapshotError: it is damaged; the message names the file.
    """
    if not stat.S_ISDIR(_status(path).st_mode):
        raise SnapshotError(f"{path}: expected a folder with a snapshot, got something else (or a link)")
    document = path / DOCUMENT
    try:
        contents = documents.from_bytes(read_bytes(document, documents.MOST_BYTES))
    except ValueError as error:
        raise SnapshotError(f"{document}: {error}; it is damaged, or not tolaria's") from error
    number = number_of(path)
    if number is not None and number != contents.number:
        raise SnapshotError(f"{document}: it belongs to snapshot {contents.number}, not {number}")
    if contents.files.keys() != {METADATA, TENSORS}:
        raise SnapshotError(f"{document}: expected it to name {METADATA} and {TENSORS}, and no other files")
    for name, digest in contents.files.items():
        status = _status(path / name)
        if not stat.S_ISREG(status.st_mode) or status.st_size != digest.size:
            raise SnapshotError(
                f"{path / name}: expected a file of {digest.size} bytes, got {_kind(status)}; "
                "it is damaged, or of another snapshot"
            )
    return contents


def open_file(path: Path) -> int:
    """A descriptor of a regular file, for reading; follows no link and waits for no pipe.

    Raises:
        SnapshotError: there is none, or it cannot be read.
    """
    flags = os.O_RDONLY | sum(
        getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")
    )
    if not stat.S_ISREG((status := _status(path)).st_mode):
        raise SnapshotError(f"{path}: expected a file, got {_kind(status)}")
    try:
        return os.open(path, flags)
    except OSError as error:
        raise SnapshotError(f"{path}: cannot be read: {error}") from error


def read_bytes(path: Path, most: int) -> bytes:
    """A file of at most ``most`` bytes.

    Raises:
        SnapshotError: it is larger, missing or cannot be read.
    """
    try:
        with open(open_file(path), "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise SnapshotError(f"{path}: cannot be read: {error}") from error
    if len(data) > most:
        raise SnapshotError(f"{path}: expected at most {most} bytes, got more")
    return data


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Inside, nobody else writes snapshots to ``folder``; yields whether that is certain.

    The system's lock (``flock``) on a file that stays there: it goes with the process, however it ends. Some
    file systems have none.

    Raises:
        FolderInUseError: somebody else writes there now.
    """
    if fcntl is None:
        yield False
        return
    path = folder / _LOCK
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(path, flags, 0o666)
    try:
        is_held = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
            raise FolderInUseError(
                f"folder: expected one that nobody writes snapshots to, got {folder}, where {owner} "
                "writes one now; name another folder, or wait"
            ) from None
        except OSError:
            is_held = False
        try:
            with suppress(OSError):  # only a note: the disk may be full
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            yield is_held
        finally:
            with suppress(OSError):  # explicitly: a forked child may hold the same descriptor
                fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, so that they outlast a crash.

    Raises:
        OSError: it cannot be made.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)


def remove(path: Path) -> None:
    """Remove a snapshot; its name goes first, so that nobody finds a half of it.

    Raises:
        OSError: it cannot be removed.
    """
    number = number_of(path)
    assert number is not None
    old = draft_path(path.parent, number, "old")
    path.rename(old)
    shutil.rmtree(old)


def remove_drafts(folder: Path) -> None:
    """Remove what writers that were killed have left; only under the folder's lock."""
    for path in folder.iterdir():
        if _DRAFT.fullmatch(path.name) and stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)  # the next writer may be luckier


def clear(folder: str | os.PathLike[str]) -> None:
    """Remove all snapshots in ``folder``, which nobody writes to; and the folder, if nothing else is in it.

    Raises:
        OSError: one cannot be removed.
    """
    where = as_path("folder", folder)
    if where.is_symlink() or not where.is_dir():
        return
    for path in where.iterdir():
        if number_of(path) is not None or _DRAFT.fullmatch(path.name):
            shutil.rmtree(path)
    (where / _LOCK).unlink(missing_ok=True)
    with suppress(OSError):  # something else lies there
        where.rmdir()


def _status(path: Path) -> os.stat_result:
    try:
        return path.lstat()
    except OSError as error:
        raise SnapshotError(f"{path}: cannot be read: {error.strerror}") from error


def _kind(status: os.stat_result) -> str:
    if stat.S_ISREG(status.st_mode):
        return f"one of {status.st_size} bytes"
    return "a link" if stat.S_ISLNK(status.st_mode) else "something else"

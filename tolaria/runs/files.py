"""Files that appear whole or not at all, and folders that one process at a time writes to."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tolaria._disk import sync_folder
from tolaria.errors import FolderInUseError

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out there
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_PATIENCE = 5  # tries to take a lock that somebody looks at


def write_draft(path: Path, data: bytes) -> Path:
    """Write ``data`` beside ``path`` and wait until it is on the disk; ``path`` itself is not touched.

    The file gets the mode that the umask leaves, as those that ``open`` makes do. A link that lies in its
    place is replaced, not followed.

    Returns:
        The draft, for ``os.replace``. Nothing is left of it if an exception is raised.
    """
    draft = draft_of(path)
    draft.unlink(missing_ok=True)
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(handle, left) :]
            os.fsync(handle)
        finally:
            os.close(handle)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return draft


def draft_of(path: Path) -> Path:
    """Where :func:`write_draft` writes."""
    return path.with_name(f".{path.name}.part")


def write_whole(path: Path, data: bytes) -> None:
    """Let a file with ``data`` stand at ``path``; whatever happens, there is the old one or the new one."""
    draft = write_draft(path, data)
    try:
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def folder_held(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Inside, no other process holds ``folder`` this way (or only for reading, if ``shared``); waits for it.

    The lock is on the folder itself and goes with the process, however it ends. File systems without locks
    keep nobody out.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # of a file system that has no locks
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class FolderLock:
    """Claims a folder for as long as this process lives, or until :meth:`release`.

    A file ``.lock`` in the folder says who has it; the lock itself is the system's (``flock``), so that one
    that a killed process left behind is taken over.

    Args:
        folder: must exist when it is claimed.
        argument: how errors call it.
    """

    def __init__(self, folder: Path, argument: str = "out") -> None:
        self._path, self._argument = folder / LOCK, argument
        self._handle: int | None = None

    def acquire(self) -> None:
        """Claim the folder, unless that is done.

        Raises:
            FolderInUseError: another run has it, and is named.
        """
        if self._handle is not None:
            return
        for _ in range(_PATIENCE):
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            if not _try_lock(handle):
                os.close(handle)
                time.sleep(0.02)  # somebody may only have looked
            elif not self._is_ours(handle):  # it was released, and its file removed, meanwhile
                os.close(handle)
            else:
                self._handle = handle
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return
        raise self._in_use()

    def check(self) -> None:
        """Raise FolderInUseError if another run has the folder; changes nothing."""
        try:
            handle = os.open(self._path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        except OSError:
            return
        try:
            if not _try_lock(handle):
                raise self._in_use()
        finally:
            os.close(handle)

    def release(self) -> None:
        """Let others have the folder."""
        if self._handle is None:
            return
        with suppress(OSError):
            if self._is_ours(self._handle):
                self._path.unlink()
        os.close(self._handle)
        self._handle = None

    def _is_ours(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _in_use(self) -> FolderInUseError:
        try:
            owner = self._path.read_text(encoding="utf-8", errors="replace")[:200] or "another process"
        except OSError:
            owner = "another process"
        return FolderInUseError(
            f"{self._argument}: expected a folder that no other run writes to, got {self._path.parent}, "
            f"which {owner} is writing to; name another folder, or wait until that run is over"
        )


def _try_lock(handle: int) -> bool:
    """Whether nobody else holds the lock; true on file systems that have none."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True

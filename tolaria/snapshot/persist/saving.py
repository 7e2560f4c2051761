"""Writes a snapshot: complete or absent."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tolaria._arguments import as_number
from tolaria._disk import sync_folder
from tolaria.errors import SnapshotError
from tolaria.snapshot.persist import dcp_metadata, documents, folders, tensor_bytes
from tolaria.snapshot.persist.dcp_metadata import Stored
from tolaria.snapshot.persist.documents import Contents, FileDigest

_PIECE = 2**20  # bytes: in the cache from CRC to copy, and worth giving the interpreter's lock away
_SMALL = 2**16  # bytes: what is shorter is copied together first, under that lock
_MOST_REST = 1000
_STRETCH = 0.001  # seconds of work between two rests


def write(
    folder: str | os.PathLike[str],
    number: int,
    tensors: Mapping[str, Tensor],
    document: Mapping[str, Any],
    *,
    keep: int = 2,
    rest: float = 0.0,
) -> Path:
    """Write the snapshot ``folder/step_000000123``; it is there whole, or not at all, whatever happens.

    It goes to a hidden folder, reaches the disk and is then renamed. ``torch.distributed.checkpoint.load``
    finds the tensors by their names. A snapshot of the same number is replaced: at every moment one of the
    two can be read. Of the others the ``keep`` - 1 written last stay; what cannot be read is never removed.
    While this runs, other threads run Python: it holds the interpreter's lock only for moments.

    Args:
        folder: made if need be. One writer at a time.
        number: from 0; at most 18 digits. Order is that of writing, not of numbers.
        tensors: on the CPU, dense, of any dtype but quantized ones; nobody may change them meanwhile.
        document: of what JSON holds, NaN and infinities included; tuples come back as lists.
        keep: how many snapshots stay, this one included.
        rest: seconds of sleep for each second of this thread's work. Beside a training loop 3 is good: to
            copy and digest takes bandwidth from it, and half a core where two threads share one.

    Returns:
        The snapshot's folder.

    Raises:
        TypeError, ValueError: a bad argument; nothing has been written then.
        FolderInUseError: another writes there now (a ValueError, too).
        SnapshotError: the disk is full, or denies something; what was there is still there.
    """
    parent = folders.as_path("folder", folder).absolute()  # another thread may change the current folder
    _check_count("number", number, 0, 10**folders.MOST_DIGITS - 1)
    _check_count("keep", keep, 1, None)
    pace = _Pace(_rest(rest))
    whole = _checked(tensors)
    plain = documents.plain_document(document)
    documents.to_bytes(Contents(number, 0, {}, plain))  # refuses what does not fit before anything is written
    try:
        folders.make_folder(parent)
        with folders.locked(parent) as is_alone:
            if is_alone:
                folders.remove_drafts(parent)
            before, _ = folders.find(parent)
            sequence = max((each.contents.sequence for each in before), default=0) + 1
            draft = folders.draft_path(parent, number, "part")
            try:
                _fill(draft, pace, number, sequence, whole, plain)
                path = _commit(draft, number)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
            _prune(path, keep)
            return path
    except OSError as error:
        raise SnapshotError(f"{parent}: snapshot {number} cannot be written: {error}") from error


def _check_count(name: str, value: object, least: int, most: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: expected an int, {wanted}, got {value}")


def _rest(value: object) -> float:
    rest = as_number("rest", value)
    if not 0 <= rest <= _MOST_REST:
        raise ValueError(f"rest: expected a number from 0 to {_MOST_REST}, got {rest}")
    return rest


def _checked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the mapping, whose tensors can all be written."""
    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors: expected a mapping, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"tensors: expected strings as names, got {type(name).__name__}")
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise TypeError(f"tensors[{name!r}]: expected a plain Tensor, got {type(tensor).__name__}")
        if not tensor.is_cpu or tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
            raise ValueError(
                f"tensors[{name!r}]: expected a dense CPU tensor that is not quantized, got one of "
                f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            )
        if tensor.dim() > tensor_bytes.MOST_DIMENSIONS:
            raise ValueError(
                f"tensors[{name!r}]: expected at most {tensor_bytes.MOST_DIMENSIONS} dimensions, "
                f"got {tensor.dim()}"
            )
    return dict(tensors)


_DTYPES = frozenset(tensor_bytes.DTYPES.values())


def _fill(
    draft: Path, pace: _Pace, number: int, sequence: int, tensors: dict[str, Tensor], plain: dict[str, Any]
) -> None:
    """Write the files of a snapshot, and wait until they are on the disk."""
    draft.mkdir()
    digests = {}
    stored = []
    with _Stream(draft / folders.TENSORS, pace) as stream:
        for name, tensor in tensors.items():
            stored.append(_write_tensor(stream, name, tensor))
            pace.keep()
        digests[folders.TENSORS] = stream.finish()
    with _Stream(draft / folders.METADATA, pace) as stream:
        stream.write(dcp_metadata.to_bytes(tuple(stored)))
        digests[folders.METADATA] = stream.finish()
    with _Stream(draft / folders.DOCUMENT, pace) as stream:
        stream.write(documents.to_bytes(Contents(number, sequence, digests, plain)))
        stream.finish()
    sync_folder(draft)


def _write_tensor(stream: _Stream, name: str, tensor: Tensor) -> Stored:
    dtype, shape = tensor.dtype, tuple(tensor.shape)
    start = stream.position
    stream.write(tensor_bytes.head(dtype, shape))
    crc = stream.write(tensor_bytes.raw_bytes(tensor))
    stream.write(tensor_bytes.tail(dtype, shape, crc))
    return Stored(name, dtype, shape, folders.TENSORS, start, stream.position - start)


def _commit(draft: Path, number: int) -> Path:
    """Give a complete draft its name; if another has it, that one keeps a second name until then.

    Raises:
        SnapshotError: what has the name is no snapshot.
    """
    path = draft.with_name(folders.snapshot_name(number))
    second = folders.replaced_path(path)
    if os.path.lexists(path):
        if path.is_symlink() or not (path / folders.DOCUMENT).is_file():
            raise SnapshotError(
                f"{path}: expected a snapshot or nothing, got something else; remove it first"
            )
        if os.path.lexists(second):  # a writer was killed before it had removed this one
            folders.remove(second)
        path.rename(second)
    try:
        draft.rename(path)
    except BaseException:
        if not os.path.lexists(path) and os.path.lexists(second):
            second.rename(path)
        raise
    sync_folder(path.parent)
    return path


def _prune(path: Path, keep: int) -> None:
    """Remove what is not kept beside ``path``; what stays because that fails goes with the next snapshot."""
    try:
        if os.path.lexists(second := folders.replaced_path(path)):
            folders.remove(second)
        candidates, _ = folders.find(path.parent)
        for each in candidates[keep:]:
            folders.remove(each.path)
    except OSError as error:
        message = f"{path.parent}: old snapshots cannot be removed: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)


class _Pace:
    """Sleeps in proportion to what this thread has worked."""

    def __init__(self, rest: float) -> None:
        self._rest = rest
        self._start, self._worked = time.perf_counter(), time.thread_time()

    def keep(self) -> None:
        """Sleep, if it is time; the clock of one thread is too slow to look at it more often."""
        if time.perf_counter() - self._start > _STRETCH:
            self._sleep()

    def _sleep(self) -> None:
        worked = time.thread_time()
        time.sleep((worked - self._worked) * self._rest)
        self._start, self._worked = time.perf_counter(), worked


class _Stream:
    """A new file, written and digested in pieces; small ones are put together."""

    def __init__(self, path: Path, pace: _Pace) -> None:
        self.position = 0
        self._pace = pace
        self._digest = hashlib.sha256()
        self._waiting = bytearray()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        flags |= sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_BINARY"))
        self._handle = os.open(path, flags, 0o666)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def write(self, data: bytes | memoryview) -> int:
        """Append ``data``; returns its CRC-32."""
        self.position += len(data)
        if len(data) < _SMALL:
            self._waiting += data
            if len(self._waiting) >= _PIECE:
                self._flush()
            return zlib.crc32(data)
        self._flush()
        crc = 0
        for start in range(0, len(data), _PIECE):
            piece = memoryview(data)[start : start + _PIECE]
            crc = zlib.crc32(piece, crc)
            self._put(piece)
        return crc

    def finish(self) -> FileDigest:
        """Wait until all is on the disk."""
        self._flush()
        os.fsync(self._handle)
        return FileDigest(self.position, self._digest.hexdigest())

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, bytearray()
        self._put(memoryview(waiting))

    def _put(self, left: memoryview) -> None:
        self._digest.update(left)
        while left:
            left = left[os.write(self._handle, left) :]
        self._pace.keep()

"""Reads a snapshot, whoever may have changed its files: it comes back whole, or is a clear error."""

from __future__ import annotations

import hashlib
import os
import warnings
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tolaria.errors import SnapshotError
from tolaria.snapshot.persist import dcp_metadata, folders, tensor_bytes
from tolaria.snapshot.persist.dcp_metadata import Stored
from tolaria.snapshot.persist.documents import Contents, FileDigest

_PIECE = 2**20  # bytes
_PATIENCE = 10  # times that a writer may remove or replace what is being read

Loaded = tuple[dict[str, Any], dict[str, Tensor]]


def newest(folder: str | os.PathLike[str]) -> Path | None:
    """The snapshot that was written last; None if there is none, or no such folder.

    Its document is whole and its files have their sizes; their bytes are looked at by :func:`read` only.
    """
    parent = folders.as_path("folder", folder)
    try:
        candidates, _ = folders.find(parent)
    except OSError:
        return None
    return candidates[0].path if candidates else None


def read(path: str | os.PathLike[str]) -> Loaded:
    """The document and the tensors of a snapshot, bit for bit as they were handed to ``write``.

    Nothing that a file says is run, and no memory is taken that its bytes do not fill.

    Args:
        path: a snapshot's folder, or one that holds snapshots. Then the one written last is read; if it is
            damaged, the one before, with a RuntimeWarning that names it.

    Raises:
        TypeError: ``path`` is no path.
        SnapshotError: there is no snapshot, or it is damaged; the message names the file and says how.
    """
    folder = folders.as_path("path", path)
    if folders.number_of(folder) is not None or os.path.lexists(folder / folders.DOCUMENT):
        folder = folder.resolve()  # a link that the caller names is meant
        return _load(folder, folders.look(folder))
    for _ in range(_PATIENCE):
        before = _entries(folder)
        found, loaded, errors = _first_whole(folder)
        if not errors or before == _entries(folder):
            break
    if loaded is None:
        reasons = "".join(f"\n  {error}" for error in errors)
        raise SnapshotError(f"{folder}: expected a whole snapshot in it, found none{reasons}")
    for error in errors:
        warnings.warn(f"{error}; {found} is read instead", RuntimeWarning, stacklevel=2)
    return loaded


def _entries(folder: Path) -> dict[str, int]:
    """The inodes of all snapshots; they change when a writer removes or replaces one."""
    try:
        with os.scandir(folder) as entries:
            return {each.name: each.inode() for each in entries if folders.number_of(Path(each)) is not None}
    except OSError as error:
        raise SnapshotError(f"{folder}: expected a folder with snapshots: {error.strerror}") from error


def _first_whole(folder: Path) -> tuple[Path | None, Loaded | None, list[SnapshotError]]:
    """The one written last of those that are whole, and what is wrong with those that may be later."""
    candidates, errors = folders.find(folder)
    for each in candidates:
        try:
            return each.path, _load(each.path, each.contents), errors
        except SnapshotError as error:
            errors.append(error)
    return None, None, errors


def _load(path: Path, contents: Contents) -> Loaded:
    metadata, tensors = path / folders.METADATA, path / folders.TENSORS
    data = folders.read_bytes(metadata, dcp_metadata.MOST_BYTES)
    if hashlib.sha256(data).hexdigest() != contents.files[folders.METADATA].sha256:
        raise SnapshotError(f"{metadata}: it is damaged, or of another snapshot: its SHA-256 is wrong")
    try:
        stored = dcp_metadata.from_bytes(data)
        _check_places(stored, contents.files[folders.TENSORS].size)
    except ValueError as error:
        raise SnapshotError(f"{metadata}: {error}") from error
    try:
        with open(folders.open_file(tensors), "rb", buffering=0) as file:
            _check_digest(file, contents.files[folders.TENSORS])
            return contents.document, {each.name: _tensor(file, each) for each in stored}
    except (OSError, ValueError) as error:
        raise SnapshotError(f"{tensors}: {error}") from error


def _check_places(stored: list[Stored], size: int) -> None:
    """The tensors must lie in the one file, one after the other, and fill it.

    So what they claim together is no more than what is there.
    """
    position = 0
    for each in sorted(stored, key=lambda each: each.offset):
        if each.file != folders.TENSORS:
            raise ValueError(f"storage_data: expected the file {folders.TENSORS}, got {each.file[:200]!r}")
        taken = tensor_bytes.byte_count(each.dtype, each.shape)
        if each.offset != position or each.length < taken:
            raise ValueError(f"storage_data: expected {taken} bytes or more from {position}, got others")
        position += each.length
    if position != size:
        raise ValueError(f"storage_data: expected tensors that fill {size} bytes, got {position}")


def _check_digest(file: BinaryIO, expected: FileDigest) -> None:
    digest = hashlib.sha256()
    piece = memoryview(bytearray(_PIECE))
    while count := file.readinto(piece):  # type: ignore[attr-defined]
        digest.update(piece[:count])
    if digest.hexdigest() != expected.sha256:
        raise ValueError("it is damaged, or of another snapshot: its SHA-256 is wrong")


def _tensor(file: BinaryIO, stored: Stored) -> Tensor:
    dtype, shape = stored.dtype, stored.shape
    head = tensor_bytes.head(dtype, shape)
    size = tensor_bytes.byte_count(dtype, shape)
    is_whole = stored.length > len(head) + size and _bytes(file, stored.offset, len(head)) == head
    if is_whole:
        raw = torch.empty(size, dtype=torch.uint8, device="cpu")
        crc = _fill(file, tensor_bytes.raw_bytes(raw))
        tail = tensor_bytes.tail(dtype, shape, crc)
        is_whole = stored.length == len(head) + size + len(tail) and file.read(len(tail)) == tail
    if not is_whole:
        raise ValueError(f"expected {stored.name[:200]!r} as {dtype} of shape {shape}, got something else")
    return raw.view(dtype).reshape(shape)


def _bytes(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)


def _fill(file: BinaryIO, left: memoryview) -> int:
    """Read until there is no more to fill; returns the CRC-32."""
    crc = 0
    while left:
        count = file.readinto(left[:_PIECE])  # type: ignore[attr-defined]
        if not count:
            raise ValueError("it became shorter while it was read")
        crc = zlib.crc32(left[:count], crc)
        left = left[count:]
    return crc

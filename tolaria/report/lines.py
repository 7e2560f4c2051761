"""JSON lines that somebody may still be writing: read on from where one was, a bounded piece at a time."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

Line = dict[str, Any]

CHUNK = 4 * 2**20
"""Bytes that are read at once; a longer line counts as damaged."""
_ODD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def number(value: object) -> float | None:
    """A recorded number, the strings that stand for NaN and infinity among them; None: it is no number."""
    if isinstance(value, str):
        return _ODD.get(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def whole(value: object) -> int | None:
    """A recorded count or step: a whole number from 0 to 2**53; None: it is none."""
    found = number(value)
    if found is None or not found.is_integer() or not 0 <= found <= 2**53:  # NaN and inf are no integers
        return None
    return int(found)


class Tail:
    """The whole lines of a file that may grow.

    A last line without an end is left for later. A line that is no JSON object is counted and passed over.

    Args:
        path: the file; it may come to exist later.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0
        """Lines that were passed over."""
        self._offset, self._inode, self._is_skipping = 0, None, False

    _inode: int | None

    @property
    def was_replaced(self) -> bool:
        """Whether the file is another one, or shorter, than what has been read of it."""
        try:
            now = self.path.stat()
        except OSError:
            return self._inode is not None
        return self._inode is not None and (now.st_ino != self._inode or now.st_size < self._offset)

    @property
    def unread(self) -> int:
        """Bytes that have not been read yet; at the end those of a line that was cut off."""
        try:
            return max(0, self.path.stat().st_size - self._offset)
        except OSError:
            return 0

    def read(self) -> list[Line] | None:
        """The next lines; None if there is no further whole one by now.

        Raises:
            OSError: the file is there and cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                self._inode = os.fstat(file.fileno()).st_ino
                file.seek(self._offset)
                data = file.read(CHUNK)
        except FileNotFoundError:
            return None
        end = data.rfind(b"\n") + 1
        if not end:
            if len(data) == CHUNK:  # the middle of an endless line
                self._offset += len(data)
                self._is_skipping = True
                return []
            return None
        self._offset += end
        start = 0
        if self._is_skipping:
            start, self._is_skipping = data.index(b"\n") + 1, False
            self.damaged += 1
        return self._parse(data[start:end])

    def _parse(self, data: bytes) -> list[Line]:
        texts = [text for text in data.split(b"\n") if text.strip()]
        try:
            values: list[Any] = json.loads(b"[" + b",".join(texts) + b"]")
            if len(values) != len(texts):  # "1,2" is one line, not two
                values = _one_by_one(texts)
        except (ValueError, RecursionError):
            values = _one_by_one(texts)
        found = [value for value in values if isinstance(value, dict)]
        self.damaged += len(texts) - len(found)
        return found


def _one_by_one(texts: list[bytes]) -> list[Any]:
    found = []
    for text in texts:
        try:
            found.append(json.loads(text))
        except (ValueError, RecursionError):
            found.append(None)
    return found


def read_object(path: Path) -> tuple[Line, str | None]:
    """The object in a JSON file, {} if there is none; and what is wrong with the file, or None."""
    try:
        value = json.loads(path.read_bytes()) if path.stat().st_size <= CHUNK else None
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{path.name} cannot be read: {error}"
    if not isinstance(value, dict):
        return {}, f"{path.name} holds no JSON object of at most {CHUNK // 2**20} MiB"
    return value, None

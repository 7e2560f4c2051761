"""``document.json``: what is no tensor, and the digests by which the files of a snapshot know each other.

The file starts with the SHA-256 of all that follows, so that no damaged byte of it is ever parsed. It is
strict JSON: a number that JSON does not know is ``{"$float": "nan"}`` (``"inf"``, ``"-inf"``), and a key of
the caller's that starts with ``$`` gets one more.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_BYTES = 2**26
"""Of a document; what is larger belongs into tensors."""
_DEEPEST = 100
_FORMAT = "tolaria snapshot 1"
_HEAD, _HEAD_END = b'{"sha256": "', b'",\n'
_HEX = 64  # characters of a SHA-256
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class FileDigest:
    """Size in bytes and SHA-256 (hexadecimal) of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Contents:
    """What ``document.json`` says.

    Attributes:
        number: of the snapshot.
        sequence: one more than that of any snapshot that was in the folder when this was written.
        files: the others in the same folder, by name.
        document: the caller's.
    """

    number: int
    sequence: int
    files: dict[str, FileDigest]
    document: dict[str, Any]


def plain_document(document: object) -> dict[str, Any]:
    """A copy of ``document`` that strict JSON can hold.

    Raises:
        TypeError: it is no mapping, a key in it is no string, or a value is nothing that JSON knows.
        ValueError: it is nested more than 100 deep.
    """
    if not isinstance(document, Mapping):
        raise TypeError(f"document: expected a mapping, got {type(document).__name__}")
    plain: dict[str, Any] = _plain(document, "document", _DEEPEST)
    return plain


def to_bytes(contents: Contents) -> bytes:
    """The file; the document must come from :func:`plain_document`.

    Raises:
        ValueError: it is larger than 64 MiB, or an integer has more digits than Python converts.
    """
    body = {
        "format": _FORMAT,
        "byteorder": sys.byteorder,
        "number": contents.number,
        "sequence": contents.sequence,
        "files": {name: [each.size, each.sha256] for name, each in contents.files.items()},
        "document": contents.document,
    }
    try:
        rest = json.dumps(body, allow_nan=False)[1:].encode() + b"\n"
    except ValueError as error:
        raise ValueError(f"document: expected what JSON can hold, got a value it cannot: {error}") from error
    if len(rest) > MOST_BYTES:
        raise ValueError(f"document: expected at most {MOST_BYTES} bytes of JSON, got {len(rest)}")
    return _HEAD + hashlib.sha256(rest).hexdigest().encode() + _HEAD_END + rest


def from_bytes(data: bytes) -> Contents:
    """What the file says.

    Raises:
        ValueError: it is damaged, or was not written by :func:`to_bytes`; the message says how.
    """
    start = len(_HEAD) + _HEX + len(_HEAD_END)
    head = _HEAD + hashlib.sha256(memoryview(data)[start:]).hexdigest().encode() + _HEAD_END
    if data[:start] != head:
        raise ValueError("its SHA-256 is not the one that it names")
    try:
        return _parsed(b"{" + data[start:])
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _parsed(text: bytes) -> Contents:
    body = json.loads(text, object_pairs_hook=_without_repetition, parse_constant=_no_constant)
    if body.get("format") != _FORMAT:
        raise ValueError(f"expected the format {_FORMAT!r}, got another")
    if body.get("byteorder") != sys.byteorder:
        raise ValueError(f"its tensors are not {sys.byteorder}-endian, as this machine is")
    document = _original(_object(body, "document"))
    return Contents(
        _count(body, "number"), _count(body, "sequence"), _digests(_object(body, "files")), document
    )


def _plain(value: object, place: str, depth: int) -> Any:  # noqa: ANN401  (whatever JSON holds)
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(float(value))}
    if depth == 0:
        raise ValueError(f"document: expected at most {_DEEPEST} levels, got more")
    if isinstance(value, list | tuple):
        return [_plain(each, f"{place}[{i}]", depth - 1) for i, each in enumerate(value)]
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{place}: expected None, a bool, int, float, str, list or dict, got {type(value).__name__}"
        )
    plain = {}
    for key, each in value.items():
        if not isinstance(key, str):
            raise TypeError(f"{place}: expected strings as keys, got {type(key).__name__}")
        plain[f"${key}" if key.startswith("$") else key] = _plain(each, f"{place}[{key!r}]", depth - 1)
    return plain


def _original(value: Any) -> Any:  # noqa: ANN401  (whatever JSON holds)
    """The inverse of ``_plain``, but for tuples, which stay lists."""
    if isinstance(value, list):
        return [_original(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"$float"}:
        if not isinstance(value["$float"], str) or value["$float"] not in _FLOATS:
            raise ValueError("it holds a number that is none")
        return _FLOATS[value["$float"]]
    return {key.removeprefix("$"): _original(each) for key, each in value.items()}


def _object(body: dict[str, Any], key: str) -> dict[str, Any]:
    if isinstance(value := body.get(key), dict):
        return value
    raise ValueError(f"expected an object as its {key}, got {type(value).__name__}")


def _digests(files: dict[str, Any]) -> dict[str, FileDigest]:
    digests = {}
    for name, said in files.items():
        match said:
            case [int(size), str(sha256)] if size >= 0 and not isinstance(size, bool):
                digests[name] = FileDigest(size, sha256)
            case _:
                raise ValueError("it names a file without size and digest")
    return digests


def _count(body: dict[str, Any], key: str) -> int:
    value = body.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"expected a natural number as its {key}, got something else")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("it names a key twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which JSON does not know")
